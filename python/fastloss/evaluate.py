"""From rows to a loss: by the path that serves. What all public losses over a vocabulary end in."""

from __future__ import annotations

import torch
from torch import Tensor

from . import rows as paths
from .backends import reference
from .parallel import VocabShard, plain
from .parallel import rows as sharded
from .reduction import reduce_rows
from .spec import Objective, Reduction, Rows

_forward_ad = torch.autograd.forward_ad
_grad_enabled = torch.is_grad_enabled


def reduced_loss(rows: Rows, to: Reduction, inplace: bool = False, shard: VocabShard | None = None) -> Tensor:
    """The loss as `to` says, in its dtype; (N,) unreduced."""
    if shard is not None:
        if plain.takes(rows, to, shard):
            return plain.reduced(rows, to, shard, inplace)
        return sharded.reduced(sharded.apply(rows, shard, inplace=inplace), rows, to)
    if to.kind != "none" and not needs_reference(rows, to.token_weight, to.normalizer):
        loss = paths.reduced(rows, to, inplace)
        if loss is not None:
            return loss
    if to.token_weight is not None and needs_reference(rows):
        rows = reference.quiet(rows, to.token_weight)
    return reduce_rows(row_losses(rows, inplace=inplace).loss, rows, to).to(to.dtype)


def row_losses(
    rows: Rows, extras: bool = False, inplace: bool = False, shard: VocabShard | None = None
) -> paths.RowLoss:
    """Losses and, with `extras`, statistics of each row."""
    if shard is not None:
        return sharded.row_loss(sharded.apply(rows, shard, sharded.statistics(rows, extras), inplace), rows)
    if not needs_reference(rows):
        return paths.per_row(rows, extras, inplace)
    if rows.weight is not None and rows.weight.requires_grad and rows.spec.objective == Objective.INDEX:
        raise RuntimeError("weight: cross_entropy of class indices is not differentiable with respect to it")
    result = reference.row_result(rows)
    if not extras:
        return paths.RowLoss(*result)
    logit = reference.target_logits(rows) if rows.spec.objective == Objective.INDEX else None
    return paths.RowLoss(*result, reference.argmax(rows), reference.rank(rows), logit)


def needs_reference(rows: Rows, *vectors: Tensor | None) -> bool:
    """Transforms of torch.func, forward-mode AD, and gradients of targets, weights or denominators."""
    if paths.transforming() or _forward_ad._current_level >= 0:
        return True
    for t in (rows.target, rows.weight, rows.probs, *vectors):
        if t is not None and t.requires_grad and _grad_enabled():
            return True
    return False
