"""From hidden states and a head to a loss: by the path that serves. As fastloss/evaluate.py for logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import evaluate
from ..backends import reference
from ..parallel import VocabShard
from ..parallel import rows as parallel
from ..reduction import mean_denominator, reduce_rows
from ..rows import RowLoss, saved_hooks_active
from ..spec import COMPUTE_DTYPE, Reduction
from .heads import LinearRows
from .rows import PerRow, Reduced, distinct, flat, needs_of
from .sharded import over_shard


def _needs_reference(given: LinearRows, *vectors: Tensor | None) -> bool:
    """As for rows of logits; and gradients of a teacher."""
    learned = given.teacher or ()
    return evaluate.needs_reference(given.rows, *learned, *vectors)


def reduced_loss(given: LinearRows, to: Reduction, shard: VocabShard | None = None) -> Tensor:
    """The loss as `to` says, in its dtype; (N,) unreduced."""
    rows = given.rows
    if shard is not None:
        return parallel.reduced(over_shard(given, shard), rows, to)
    if _needs_reference(given, to.token_weight, to.normalizer):
        return evaluate.reduced_loss(given.materialised(to.token_weight), to)
    needs = needs_of(given.head)
    if to.kind == "none" or saved_hooks_active():  # checkpointing, offloading: no gradients in the forward
        return reduce_rows(per_row(given).loss, rows, to).to(to.dtype)
    normalizer = to.normalizer
    if normalizer is None and to.kind == "mean":
        ones = given.head.hidden.new_ones(rows.input.shape[0], dtype=COMPUTE_DTYPE[rows.input.dtype])
        normalizer = mean_denominator(ones, rows, to)
    args = *distinct(*flat(given), to.token_weight, normalizer), needs
    loss = Reduced.apply(*args) if any(needs) else torch.ops.fastloss.linear_loss(*args)[0]
    return loss.to(to.dtype)


def per_row(given: LinearRows, extras: bool = False, shard: VocabShard | None = None) -> RowLoss:
    """Losses and, with `extras`, statistics of each row; differentiable in the head."""
    if shard is not None:
        return parallel.row_loss(over_shard(given, shard, parallel.statistics(given.rows, extras)), given.rows)
    if _needs_reference(given):
        return evaluate.row_losses(given.materialised(), extras)
    out = PerRow.apply(*distinct(*flat(given)), extras, False, needs_of(given.head))
    return RowLoss(*out) if extras else RowLoss(out)


def selected(given: LinearRows, extras: bool, shard: VocabShard | None = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, K) of listed classes and, with `extras`, the entropy (N,); differentiable in the head."""
    if shard is not None:
        return parallel.selected(over_shard(given, shard, parallel.Asked(extras, True)), given.rows)
    if _needs_reference(given):
        return reference.selected(given.materialised())
    return PerRow.apply(*distinct(*flat(given)), extras, True, needs_of(given.head))
