"""Losses and log-probabilities of some classes, from hidden states."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..logprobs import of_one_class, selective_rows
from ..parallel import VocabShard
from ..public import public_loss
from ..topk import less_entropy, topk_rows
from .evaluate import per_row, reduced_loss, selected
from .heads import MAX_CHUNK_BYTES, Head, LinearRows, flattened, room, stand_in


@public_loss
def linear_topk_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    indices: Tensor,
    probs: Tensor,
    *,
    linear_bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    r"""``fastloss.topk_cross_entropy(F.linear(input, linear_weight, linear_bias), indices, probs, ...)``

    without the (..., V) logits.

    Args:
        input: hidden states (..., H); linear_weight: (V, H); linear_bias: (V).
        indices, probs: (..., K), as in `topk_cross_entropy`.
        options: of `topk_cross_entropy`, without inplace; and max_chunk_bytes.

    Raises, and memory: as `linear_cross_entropy`.
    """
    return _topk(Head(input, linear_weight, linear_bias), indices, probs, False, **options)


@public_loss
def linear_topk_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    indices: Tensor,
    probs: Tensor,
    *,
    linear_bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    r"""``fastloss.topk_kl_div(F.linear(input, linear_weight, linear_bias), indices, probs, ...)``

    without the (..., V) logits: distillation from a teacher's stored top-k. Arguments as in
    `linear_topk_cross_entropy`, options those of `topk_kl_div`.
    """
    if "weight" in options or "label_smoothing" in options:
        raise TypeError("linear_topk_kl_div() takes neither weight nor label_smoothing")
    return _topk(Head(input, linear_weight, linear_bias), indices, probs, True, **options)


def _topk(
    head: Head,
    indices: Tensor,
    probs: Tensor,
    divergence: bool,
    *,
    tail: str = "ignore",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    out_dtype: torch.dtype | None = None,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
    shard: VocabShard | None = None,
) -> Tensor:
    arguments.check_linear(*head)
    logits = stand_in(head)
    numbers = (label_smoothing, z_loss, softcap, logit_scale)
    rows = topk_rows(logits, indices, probs, tail, weight, ignore_index, numbers).flat()
    to = arguments.as_reduction(logits, reduction, token_weight, mask, normalizer, out_dtype)
    given = LinearRows(rows, flattened(head), None, *room(head, max_chunk_bytes, shard=shard))
    reduced = partial(reduced_loss, shard=shard)
    loss = less_entropy(reduced, given, rows, to) if divergence else reduced(given, to)
    return loss.reshape(logits.shape[:-1]) if reduction == "none" else loss


@public_loss
def linear_selective_log_softmax(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    row_mask: Tensor | None = None,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
    shard: VocabShard | None = None,
) -> Any:
    r"""``fastloss.selective_log_softmax(F.linear(input, linear_weight, linear_bias), index, temperature=...)``

    without the (..., V) logits: the log-likelihood of chosen tokens from hidden states, for RL and scoring. Rows
    without effect are left out as in `linear_cross_entropy`: ignored and masked rows, and in a backward rows whose
    upstream gradients are all zero.

    Args:
        input: hidden states (..., H); linear_weight: (V, H); linear_bias: (V).
        index: (...) or (..., K), int64, int32 or uint8.
        temperature, return_entropy, ignore_index, softcap, logit_scale, row_mask: as in `selective_log_softmax`.
        max_chunk_bytes, shard: as in `linear_cross_entropy`.

    Returns:
        log-probabilities of index's shape, or (log-probabilities, entropy (...)); float32 (float64 for float64).

    Raises: as `linear_cross_entropy`.  Memory: as there with reduction="none".
    """
    head = Head(input, linear_weight, linear_bias)
    arguments.check_linear(*head)
    logits = stand_in(head)
    rows, expected = selective_rows(logits, index, (ignore_index, temperature, softcap, logit_scale), row_mask)
    given = LinearRows(rows.flat(), flattened(head), None, *room(head, max_chunk_bytes, shard=shard))
    if rows.probs is not None:
        log_prob, entropy = selected(given, return_entropy, shard)
    else:
        log_prob, entropy = of_one_class(per_row(given, return_entropy, shard))
    log_prob = log_prob.reshape(expected)
    return (log_prob, entropy.reshape(logits.shape[:-1])) if return_entropy else log_prob
