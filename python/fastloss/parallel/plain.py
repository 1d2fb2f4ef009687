"""The cross-entropy that nearly every run asks for, of class indices alone, on CPUs. What rows.py and merge.py say in
a hundred operations on vectors of N are two calls of the kernels, around the same collective: small losses are made of
such operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import choose, native
from ..rows import eager, transforming
from ..saved import save, saved
from ..spec import Objective, Reduction, Rows
from .rows import PLAIN, refuse_formula, written
from .shard import BLOCK_BYTES, HEADER_BYTES, VocabShard, check_padding, exchange, header_of, new_block


def takes(rows: Rows, to: Reduction, shard: VocabShard) -> bool:
    """Whether this is that loss, and fits into one collective. Ranks need not agree: what they send is the same."""
    spec, divisor = rows.spec, to.normalizer
    if not isinstance(shard, VocabShard) or not shard.sum_hidden or transforming():  # who is told so elsewhere
        return False
    plain = spec.objective is Objective.INDEX and not spec.label_smoothing and not spec.z_loss and rows.weight is None
    if not plain or to.kind == "none" or to.token_weight is not None or (divisor is not None and divisor.requires_grad):
        return False
    if not eager(*rows.tensors(), divisor):
        return False
    size = rows.N * native.PART_COLUMNS * rows.compute_dtype.itemsize
    fits = shard.part.size > 0 and shard.ranks > 1 and size <= BLOCK_BYTES - HEADER_BYTES
    return fits and choose(rows).name == "cpu"


def _over(total: float, divisor: float) -> float:
    """As tensors divide: NaN where it is the mean of nothing."""
    return total / divisor if divisor else total * torch.inf


class PlainReduced(torch.autograd.Function):
    """(input, (rows, reduction, shard, inplace)) -> scalar loss."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, call: tuple[Rows, Reduction, VocabShard, bool]) -> Tensor:
        rows, to, shard, ctx.inplace = call
        header = header_of(rows, shard, PLAIN)
        block = new_block(header, input.device)
        part = rows._replace(input=input.detach()[..., : shard.part.size])
        count = native.part_loss(part, shard.start, shard.vocab_size, block[HEADER_BYTES:])
        everyone = exchange(block, header, shard)
        total, stats = native.merge_parts(everyone, HEADER_BYTES, rows.N, rows.compute_dtype)
        divisor = (count if to.kind == "mean" else 1) if to.normalizer is None else float(to.normalizer)
        save(ctx, input, rows.target, stats)
        ctx.spec, ctx.shard, ctx.divisor = rows.spec, shard, divisor
        return native.scalar(_over(total, divisor), to.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        refuse_formula(upstream)
        input, target, stats = saved(ctx)
        size, factor = ctx.shard.part.size, _over(upstream.item(), ctx.divisor)
        rows = Rows(input.detach()[..., :size], target, None, ctx.spec)
        write = lambda grad: native.part_grad(rows, ctx.shard.start, stats, factor, grad)  # noqa: E731
        return written(input, size, ctx.inplace, write), None


def reduced(rows: Rows, to: Reduction, shard: VocabShard, inplace: bool) -> Tensor:
    """The loss as `to` says."""
    check_padding(rows.input.shape[-1], shard)
    loss: Tensor = PlainReduced.apply(rows.input, (rows, to, shard, inplace))
    return loss
