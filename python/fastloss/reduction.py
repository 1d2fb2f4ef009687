"""From per-row losses to what the caller asked for. Plain torch on (N,) vectors, differentiable in every argument."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import Objective, Reduction, Rows


def valid_rows(rows: Rows) -> Tensor | None:
    """Which rows count, (N,): those whose target is not ignored. None where all do."""
    if not rows.spec.objective.indexed:
        return None
    valid = rows.target != rows.spec.ignore_index
    return valid if valid.dim() == 1 else valid.any(-1)


def rows_that_count(rows: Rows, *factors: Tensor | None) -> Tensor | None:
    """Which rows (N,) have an effect: those that are not ignored and whose factors, (N,) or (N, K) token weights or
    upstream gradients, are not all zero. None where nothing can tell."""
    counts = valid_rows(rows)
    given = [g != 0 if g.dim() == 1 else (g != 0).any(-1) for g in factors if g is not None]
    if not given:
        return counts
    some = given[0]
    for more in given[1:]:
        some = some | more
    return some if counts is None else counts & some


def reduce_rows(loss: Tensor, rows: Rows, to: Reduction, target_weight: Tensor | None = None) -> Tensor:
    """`loss` (N,) is zero where the target is ignored. A mean divides by the summed weights of the rows that count;
    `target_weight` (N,) are those of their classes, by default looked up in rows.weight. Zero times infinity is zero:
    neither an ignored row nor one without weight shows."""
    if to.token_weight is not None:
        nothing = (loss == 0) | (to.token_weight == 0)
        loss = torch.where(nothing, 0, loss * to.token_weight)
    if to.kind == "none":
        return loss
    total = loss.sum()
    if to.normalizer is not None:
        return total / to.normalizer
    return total if to.kind == "sum" else total / mean_denominator(loss, rows, to, target_weight)


def mean_denominator(loss: Tensor, rows: Rows, to: Reduction, target_weight: Tensor | None = None) -> Tensor:
    """The summed weights of the rows that count, for a loss (N,) of any values."""
    counts = torch.ones_like(loss) if to.token_weight is None else to.token_weight
    valid = valid_rows(rows)
    if valid is None:
        return counts.sum()
    if target_weight is not None:
        counts = counts * target_weight
    elif rows.weight is not None and rows.spec.objective == Objective.INDEX:
        counts = counts * rows.weight.to(loss.dtype).index_select(0, torch.where(valid, rows.target, 0))
    return torch.where(valid, counts, 0).sum()
