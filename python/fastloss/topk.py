"""Losses against the probabilities of some classes: distillation from a teacher's stored top-k."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import arguments
from .backends import reference
from .evaluate import reduced_loss
from .parallel import VocabShard
from .public import public_loss
from .reduction import reduce_rows
from .spec import COMPUTE_DTYPE, Objective, Reduction, Rows, make_spec
from .strides import count_rows

_TAILS = {"ignore": Objective.TOPK, "lump": Objective.TOPK_TAIL}


@public_loss
def topk_cross_entropy(
    input: Tensor,
    indices: Tensor,
    probs: Tensor,
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
    inplace: bool = False,
    shard: VocabShard | None = None,
) -> Tensor:
    r"""``-(probs * input.log_softmax(-1).gather(-1, indices)).sum(-1)``

    of each row: cross-entropy against probabilities of which only some classes' are known. With tail="lump" all other
    classes are one more, of probability 1 - probs.sum(-1).

    Args:
        input: logits (..., V); float32, bfloat16, float16 or float64, any strides as in `cross_entropy`. Sums
            are float32 (float64 for float64).
        indices: (..., K) classes in [0, V), int64, int32 or uint8. A class listed twice has the sum of its
            probabilities; an entry of `ignore_index` is not there; a row of nothing else has zero loss and gradient,
            and does not count in the mean.
        probs: (..., K), the probabilities of those classes; they need not sum to one. Differentiable, by the slower
            textbook expression. From stored logits: ``(logits - lse).exp()``.
        tail: "ignore" the classes that are not listed, or "lump" them together; with "lump" neither `weight` nor
            `label_smoothing`.
        weight: (V), one weight per class. The mean does not divide by it, as with class probabilities.
        label_smoothing, z_loss, softcap, logit_scale: as in `cross_entropy`.
        token_weight, mask, reduction, normalizer, out_dtype, inplace, shard: as in `kl_div_with_logits`, reduction
            without "batchmean".

    Returns:
        A scalar, or with reduction="none" a tensor of shape (...).

    Raises:
        IndexError: a class out of range (on the CPU).  ValueError, RuntimeError, TypeError: naming the argument.

    Memory: the gradient, and O(N K + V) beyond it; never (N, V) probabilities.
    """
    rows = topk_rows(input, indices, probs, tail, weight, ignore_index, (label_smoothing, z_loss, softcap, logit_scale))
    to = arguments.as_reduction(input, reduction, token_weight, mask, normalizer, out_dtype)
    if inplace:
        arguments.check_inplace(input, rows.input)
    loss = reduced_loss(rows, to, inplace, shard)
    return loss.reshape(input.shape[:-1]) if reduction == "none" else loss


@public_loss
def topk_kl_div(
    input: Tensor,
    indices: Tensor,
    probs: Tensor,
    *,
    tail: str = "ignore",
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    out_dtype: torch.dtype | None = None,
    inplace: bool = False,
    shard: VocabShard | None = None,
) -> Tensor:
    r"""``(probs * (probs.log() - input.log_softmax(-1).gather(-1, indices))).sum(-1)``

    of each row: `topk_cross_entropy` less the entropy of `probs`. With tail="lump" it is the divergence of the
    distributions over K + 1 classes: zero where they agree, never negative where `probs` sums to at most one. With
    tail="ignore" it can be negative.

    Arguments, result, errors and memory as in `topk_cross_entropy`.
    """
    rows = topk_rows(input, indices, probs, tail, None, ignore_index, (0.0, z_loss, softcap, logit_scale))
    to = arguments.as_reduction(input, reduction, token_weight, mask, normalizer, out_dtype)
    if inplace:
        arguments.check_inplace(input, rows.input)
    loss = less_entropy(partial(reduced_loss, inplace=inplace, shard=shard), rows, rows, to)
    return loss.reshape(input.shape[:-1]) if reduction == "none" else loss


def less_entropy(reduced: Callable[[Any, Reduction], Tensor], given: Any, rows: Rows, to: Reduction) -> Tensor:
    """The cross-entropy `reduced(given, to)` less the entropy of the rows' target, rounded after the difference."""
    exact = to._replace(dtype=COMPUTE_DTYPE[rows.input.dtype])
    return (reduced(given, exact) - reduce_rows(_entropy(rows), rows, exact)).to(to.dtype)


def topk_rows(
    input: Tensor,
    indices: Tensor,
    probs: Tensor,
    tail: str,
    weight: Tensor | None,
    ignore_index: int,
    numbers: tuple[float, float, float | None, float],
) -> Rows:
    """Checked rows of logits (..., V) and what their target lists; numbers: label_smoothing, z_loss, softcap,
    logit_scale."""
    if tail not in _TAILS:
        raise ValueError(f"tail: expected 'ignore' or 'lump', got {tail!r}")
    if tail == "lump" and (weight is not None or numbers[0]):
        raise ValueError("tail: expected 'ignore' with weight or label_smoothing, got 'lump'")
    x = arguments.classes_last(input)
    K = indices.shape[-1] if isinstance(indices, Tensor) and indices.dim() else 0
    shape = (*input.shape[:-1], K)
    y = arguments.beside(indices, "indices", input, torch.Size(shape), integral=True).reshape(count_rows(x), K)
    q = arguments.beside(probs, "probs", input, torch.Size(shape)).reshape(count_rows(x), K)
    if weight is not None:
        weight = arguments.beside(weight, "weight", input, x.shape[-1:])
    return Rows(x, y, weight, make_spec(ignore_index, *numbers, _TAILS[tail]), q)


def _entropy(rows: Rows) -> Tensor:
    """Of the target, (N,): 0 log 0 is 0."""
    _, q = reference.listed(rows)
    entropy = -torch.xlogy(q, q).sum(-1)
    if rows.spec.objective == Objective.TOPK_TAIL:
        rest = (1 - q.sum(-1)).clamp(min=0)
        entropy = entropy - torch.xlogy(rest, rest)
    return entropy
