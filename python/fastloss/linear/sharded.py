"""Losses of hidden states whose head each rank has some rows of: the autograd Function, as fastloss/parallel/rows.py
has it for logits.

Forward: each rank's logits, some rows at a time, into the statistics of its part, and one collective. Backward: the
logits again, the gradients of the head's part, and those of the hidden states summed over ranks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel import VocabShard
from ..parallel.groups import group_named
from ..parallel.merge import PartLoss, Whole, kept_of, rows_of
from ..parallel.rows import PLAIN, Asked, Outcome, check, of_part, outcome, over_ranks, refuse_formula
from ..rows import library
from ..spec import COMPUTE_DTYPE, Objective, Rows
from . import blocks, grads
from .chunks import chunks, row_loss, without_effect
from .grads import HeadGrads
from .heads import Head, LinearRows
from .rows import SCHEMA, as_inputs, distinct, fake_grads, flat, needs_of, record, save, saved

_SHARD = "int start, int stop, int vocab_size, str group, bool sum_hidden"
library.define(f"sharded_head_loss({SCHEMA}, {_SHARD}, bool extras, bool picks) -> Tensor[]")
library.define(
    f"sharded_head_grad({SCHEMA}, Tensor[] stats, Tensor?[] upstream, {_SHARD}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)"
)


def _fields(shard: VocabShard) -> tuple[Any, ...]:
    """The arguments of _SHARD."""
    name = shard.group_name if shard.ranks > 1 else ""
    return shard.start, shard.stop, shard.vocab_size, name, shard.sum_hidden


def _shard_of(start: int, stop: int, vocab_size: int, group: str, sum_hidden: bool) -> VocabShard:
    return VocabShard(start, stop, vocab_size, group_named(group) if group else None, sum_hidden)


@torch.library.impl(library, "sharded_head_loss", "CompositeExplicitAutograd")
def _sharded_head_loss(*args: Any) -> list[Tensor]:
    """(loss, stats, target's class weight, argmax, logits listed; of a tail its centre, log-sum and weight), empty
    where there is none."""
    given, (*fields, extras, picks) = record(*args)
    shard = _shard_of(*fields)
    local = rows_of(given.rows, shard.part)
    whole = over_ranks(given.rows, local, shard, partial(_compute, given), Asked(extras, picks))
    none = whole.loss.new_empty(0)
    found = whole.target_weight, whole.argmax, whole.picked, *(whole.tail or (None, None)), whole.rest
    return [whole.loss, whole.stats, *(none.clone() if t is None else t for t in found)]


@torch.library.register_fake("fastloss::sharded_head_loss", lib=library)
def _(*args: Any) -> list[Tensor]:
    given, (*_, extras, picks) = record(*args)
    rows, objective, new = given.rows, given.rows.spec.objective, given.head.hidden.new_empty
    N, K, F = rows.input.shape[0], rows.target.shape[1] if rows.probs is not None else 1, rows.compute_dtype
    weighted, tailed = rows.weight is not None and objective == Objective.INDEX, objective == Objective.TOPK_TAIL
    return [
        new(N, dtype=F),
        new((5, N), dtype=F),
        new(N if weighted else 0, dtype=F),
        new(N, dtype=torch.int64) if extras else new(0, dtype=F),
        new((N, K) if picks else 0, dtype=F),
        *(new(N if tailed else 0, dtype=F) for _ in range(3)),
    ]


@torch.library.impl(library, "sharded_head_grad", "CompositeExplicitAutograd")
def _sharded_head_grad(*args: Any) -> tuple[Tensor, ...]:
    given, (kept, upstream, *fields, needs) = record(*args)
    shard = _shard_of(*fields)
    return tuple(_head_grads(given, rows_of(given.rows, shard.part), shard, kept_of(*kept), upstream, needs))


@torch.library.register_fake("fastloss::sharded_head_grad", lib=library)
def _(*args: Any) -> tuple[Tensor, ...]:
    given, (*_, needs) = record(*args)
    return tuple(fake_grads(given, needs))


class ShardedHead(torch.autograd.Function):
    """(*arguments of linear_loss, shard, asked, needs) -> Outcome."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        *call, shard, asked, needs = args
        loss, stats, *found = torch.ops.fastloss.sharded_head_loss(*call, *_fields(shard), *asked)
        weight, argmax, picked, *tail = (t if t.shape[0] == loss.shape[0] else None for t in found)
        save(ctx, call, stats, *(t for t in tail if t is not None))
        ctx.set_materialize_grads(False)
        ctx.shard, ctx.needs = shard, needs
        whole = Whole(
            loss, stats, None, None, weight, argmax if asked.extras else None, picked if asked.picks else None
        )
        return tuple(outcome(ctx, whole, asked))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        refuse_formula(*upstream)
        call, stats = saved(ctx)
        given, _ = record(*call)
        args = list(stats), list(upstream[:4]), *_fields(ctx.shard), ctx.needs
        grads = torch.ops.fastloss.sharded_head_grad(*call, *args)
        return *as_inputs(grads, given), *([None] * len(call))


def _compute(given: LinearRows, local: Rows, extras: bool, picks: bool, whole: Tensor | None) -> PartLoss:
    loss, stats, argmax, logits = row_loss(given._replace(rows=local), extras, whole)
    return PartLoss(loss, stats, argmax, _logits_of(given.head, argmax) if extras else loss, logits)


def _logits_of(head: Head, index: Tensor) -> Tensor:
    """Of one class of each row."""
    dtype = COMPUTE_DTYPE[head.dtype()]
    logits = (head.hidden.to(dtype) * head.weight[index].to(dtype)).sum(-1)
    return logits if head.bias is None else logits + head.bias[index].to(dtype)


def _head_grads(
    given: LinearRows, local: Rows, shard: VocabShard, whole: Whole, upstream: Any, needs: list[bool]
) -> list[Tensor]:
    """Of this rank's part of the head, and of the hidden states over all ranks: a chunk's sum is under way while its
    part of the weight's, and the next chunk, are made."""
    backend, skipped = given.backend(), without_effect(given.rows, *upstream)
    by_blocks = blocks.needed(given, needs)
    of_chunks = [needs[0], False, False] if by_blocks else needs
    sums = shard.ranks > 1 and shard.sum_hidden
    begin_sum = partial(dist.all_reduce, group=shard._group, async_op=True) if sums else None
    made = HeadGrads(given.head, of_chunks, backend.matmul, begin_sum=begin_sum)
    for chunk in chunks(given._replace(rows=local), backend, skipped) if any(of_chunks) else ():
        if shard.part.size:
            grads.write_part(given, shard.part, whole, upstream, chunk)
        made.add(chunk)
    weight = blocks.weight_grads(given, shard.part, whole, upstream, needs, skipped) if by_blocks else []
    found = made.result(skipped)
    return [found[0], *weight] if by_blocks else found


def over_shard(given: LinearRows, shard: VocabShard, asked: Asked = PLAIN) -> Outcome:
    """Rows of hidden states; each rank has its part of the head, and of the teacher's."""
    check(given.rows, shard)
    size, learned = shard.part.size, [t for t in given.teacher or () if t is not None and t.requires_grad]
    if learned and torch.is_grad_enabled():
        raise NotImplementedError("target_input, target_linear_weight: expected no gradient to be wanted with shard")
    rows = of_part(given.rows, shard)
    rows = rows._replace(input=rows.input[:, :size])
    if given.teacher is not None:
        rows = rows._replace(target=rows.input)
    teacher = None if given.teacher is None else given.teacher.of_classes(0, size)
    given = LinearRows(rows, given.head.of_classes(0, size), teacher, given.limit, given.block_bytes)
    return Outcome(*ShardedHead.apply(*distinct(*flat(given)), shard, asked, needs_of(given.head)))
