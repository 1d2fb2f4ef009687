"""Keyword arguments that several functions take, for type checkers: an overload unpacks them instead of naming each."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from .parallel import VocabShard


class SelectiveKeywords(TypedDict, total=False):
    """Of `selective_log_softmax`."""

    temperature: float
    ignore_index: int
    softcap: float | None
    logit_scale: float
    row_mask: Tensor | None
    shard: VocabShard | None


class BeyondTorch(TypedDict, total=False):
    """What cross-entropy takes beyond torch's, of logits and of hidden states."""

    z_loss: float
    softcap: float | None
    logit_scale: float
    token_weight: Tensor | None
    mask: Tensor | None
    normalizer: Tensor | float | None
    out_dtype: torch.dtype | None
    shard: VocabShard | None


class CrossEntropyKeywords(BeyondTorch, total=False):
    """Of `cross_entropy`."""

    size_average: bool | None
    ignore_index: int
    reduce: bool | None
    reduction: str
    label_smoothing: float
    inplace: bool


class LinearCrossEntropyKeywords(BeyondTorch, total=False):
    """Of `linear_cross_entropy`."""

    linear_bias: Tensor | None
    weight: Tensor | None
    reduction: str
    ignore_index: int | None
    label_smoothing: float
    options: object
    max_chunk_bytes: int
    filter_eps: float | None
