"""From per-row losses to what the caller asked for. Plain torch on (N,) vectors, differentiable in every argument."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import Spec


def valid_rows(target: Tensor, spec: Spec) -> Tensor | None:
    """Which rows count, (N,); None when all do, as with class probabilities."""
    return None if target.is_floating_point() else target != spec.ignore_index


def reduce_rows(
    loss: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | None,
    spec: Spec,
    reduction: str,
) -> Tensor:
    """`loss` (N,) is zero where the target is ignored. A mean divides by the summed weights of the rows that count."""
    if token_weight is not None:
        loss = torch.where(loss == 0, loss, loss * token_weight)  # an ignored row stays zero under an infinite weight
    if reduction == "none":
        return loss
    total = loss.sum()
    if normalizer is not None:
        return total / normalizer
    return total if reduction == "sum" else total / _mean_denominator(loss, target, weight, token_weight, spec)


def _mean_denominator(
    loss: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None, spec: Spec
) -> Tensor:
    counts = torch.ones_like(loss) if token_weight is None else token_weight
    valid = valid_rows(target, spec)
    if valid is None:
        return counts.sum()
    if weight is not None:
        counts = counts * weight.to(loss.dtype)[torch.where(valid, target, 0)]
    return torch.where(valid, counts, 0).sum()
