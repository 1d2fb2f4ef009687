"""A batch of which each rank has some rows: all of it on every rank, where each row must meet all others."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .shard import VocabShard


class AllRows(torch.autograd.Function):
    """(rows (N_r, ...) of this rank, shard, summed) -> those of all ranks (N, ...), at the places their shards say. The
    gradient is what all ranks give to this one's rows; `summed`: it already is, on every rank."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shard: VocabShard, summed: bool) -> Tensor:
        ctx.shard, ctx.summed = shard, summed
        if len(rows) != shard.stop - shard.start:
            raise ValueError(
                f"shard: expected [start, stop) of {len(rows)} rows, this rank's of the batch, got [{shard.start}, "
                f"{shard.stop})"
            )
        if shard.ranks == 1:
            return rows.view_as(rows)
        # Where each rank's rows are counts for little beside them; a sum needs no sizes.
        everyone = rows.new_zeros((shard.vocab_size, *rows.shape[1:]))
        everyone[shard.start : shard.stop] = rows
        dist.all_reduce(everyone, group=shard._group)
        return everyone

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        shard = ctx.shard
        if shard.ranks > 1 and not ctx.summed:
            upstream = upstream.contiguous().clone()
            dist.all_reduce(upstream, group=shard._group)
        return upstream[shard.start : shard.stop], None, None


def all_rows(rows: Tensor, shard: VocabShard, summed: bool) -> Tensor:
    """See AllRows."""
    gathered: Tensor = AllRows.apply(rows, shard, summed)
    return gathered
