"""The gradient of a 16-bit head's weight, some classes at a time.

Its sums over rows are float32, twice the size of what they become. Where they would take too much, a block of classes
is summed over all rows and rounded before the next: the kernels know how to take a part of a vocabulary
(fastloss/parallel/merge.py). The logits are made again for it, when their statistics are known: four products, not
three. Those of hidden states are made with the statistics, of all classes, and are complete with their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..parallel.merge import Log, Part, Whole, rest_of, rows_of
from ..spec import COMPUTE_DTYPE, Objective, Reduction, Rows
from . import grads
from .chunks import Chunk, equal_parts, row_loss, without_effect
from .grads import NO_FACTORS, Factors, HeadGrads
from .heads import LinearRows, empty, filters, row_bytes, sum_bytes

_PANEL = 64  # blocks are whole panels of the matrix product's, of any instruction set


def needed(given: LinearRows, needs: list[bool]) -> bool:
    """Whether the weight's gradient is summed in more memory than its logits may take."""
    weight = given.head.weight
    if not (needs[1] and weight.shape[0] * sum_bytes(given.head, weight) > given.block_bytes):
        return False
    backend = given.backend()
    return backend.in_parts and not filters(given, backend)  # by tiles of all rows and classes


def loss_and_grads(
    given: LinearRows, to: Reduction, needs: list[bool], upstream: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """As grads.loss_and_grads, but the weight's in its own dtype: rounded here, for the upstream gradient."""
    backend, rows = given.backend(), given.rows
    rounded = [given.head.hidden.dtype != rows.compute_dtype, True]
    inside, scale, factors = grads.scaled(given, backend, to, upstream, rounded)
    of_hidden = HeadGrads(given.head, [needs[0], False, False], backend.matmul, factors)
    four: list[Tensor | None] = [grads.upstream_of(rows, inside, scale), None, None, None]

    def add(chunk: Chunk, stats: Tensor) -> None:
        backend.row_grad(chunk.rows, stats, [chunk.of(g) for g in four], chunk.rows.input)
        of_hidden.add(chunk)

    loss, stats, *_ = row_loss(given, False, None, to.token_weight, add if needs[0] else None)
    hidden, *_ = of_hidden.result(without_effect(rows, *four))
    return grads.summed(loss, rows, to), [hidden, *_weight_grads(given, stats, four, needs, factors)]


def row_grads(given: LinearRows, stats: Tensor, upstream: list[Tensor | None], needs: list[bool]) -> list[Tensor]:
    """As grads.row_grads, but the weight's in its own dtype."""
    if needs[0]:
        hidden, *_ = grads.row_grads(given, stats, upstream, [True, False, False])
    else:
        hidden, *_ = grads.no_grads(given)
    return [hidden, *_weight_grads(given, stats, upstream, needs)]


def _weight_grads(
    given: LinearRows,
    stats: Tensor,
    upstream: list[Tensor | None],
    needs: list[bool],
    factors: Factors = NO_FACTORS,
) -> list[Tensor]:
    """From statistics and upstream gradients of rows as kernels have them."""
    whole, V = _whole(given.rows, stats), given.head.weight.shape[0]
    of_outcome = _of_outcome(given.rows, whole, upstream)
    return weight_grads(given, Part(0, V, V), whole, of_outcome, needs, without_effect(given.rows, *upstream), factors)


def weight_grads(
    given: LinearRows,
    part: Part,
    whole: Whole,
    upstream: Sequence[Tensor | None],
    needs: list[bool],
    skipped: Tensor | None,
    factors: Factors = NO_FACTORS,
) -> list[Tensor]:
    """Of weight and bias of a part of the classes, those `given` has, from upstream gradients of an Outcome's first
    four."""
    head, dtype = given.head, COMPUTE_DTYPE[given.head.dtype()]
    _, *shapes = head.grad_shapes(needs)
    weight = empty(shapes[0], head.weight.dtype, head.hidden.device)
    bias = torch.empty(shapes[1], dtype=dtype, device=head.hidden.device)
    for block in _blocks(given, part):
        local = _rows_of(given, part, block)
        write = partial(grads.write_part, given, block, whole, upstream)
        within = slice(block.start - part.start, block.stop - part.start)
        _sum_block(local, [False, *needs[1:]], write, skipped, factors, weight[within], bias[within])
    return [weight, bias]


def _sum_block(
    block: LinearRows,
    needs: list[bool],
    write: Callable[[Chunk], None],
    skipped: Tensor | None,
    factors: Factors,
    weight: Tensor,
    bias: Tensor,
) -> None:
    """Into the last two, where they are wanted; the sums are gone before the next block's are made."""
    made = HeadGrads(block.head, needs, block.backend().matmul, factors)
    _, *found = grads.sum_up(block, made, write, skipped)
    for to, grad, needed in zip((weight, bias), found, needs[1:], strict=True):
        if needed:
            to.copy_(grad)


def _blocks(given: LinearRows, part: Part) -> Iterator[Part]:
    """Of equal size."""
    each = sum_bytes(given.head, given.head.weight)
    size = equal_parts(part.size, max(given.block_bytes // each, 1), _PANEL)
    for start in range(part.start, part.stop, size):
        yield Part(start, min(start + size, part.stop), part.vocab_size)


def _rows_of(given: LinearRows, part: Part, block: Part) -> LinearRows:
    """Of a block of a part's classes, as if there were no others."""
    classes = slice(block.start - part.start, block.stop - part.start)
    head = given.head.of_classes(classes.start, classes.stop)
    teacher = None if given.teacher is None else given.teacher.of_classes(classes.start, classes.stop)
    rows = given.rows
    target = rows.target if rows.spec.objective.indexed else rows.target[..., classes]
    weight = None if rows.weight is None else rows.weight[classes]
    local = rows_of(rows._replace(input=rows.input[:, classes], target=target, weight=weight), block)
    limit = max(1, given.block_bytes // row_bytes(block.size, head.dtype(), teacher is not None))
    return LinearRows(local, head, teacher, limit, given.block_bytes)


def _whole(rows: Rows, stats: Tensor) -> Whole:
    """From statistics as kernels give them."""
    if rows.spec.objective != Objective.TOPK_TAIL or rows.probs is None:
        return Whole(stats[0], stats)
    q = torch.where(rows.target == rows.spec.ignore_index, 0, rows.probs.to(stats.dtype))
    mass, zero = q.sum(1), torch.zeros_like(stats[0])
    tail = Log(torch.where(stats[2] == -torch.inf, -torch.inf, stats[0]), stats[1])
    return Whole(stats[0], torch.stack([stats[4], stats[3], zero, mass, zero]), tail, rest_of(mass, tail))


def _of_outcome(rows: Rows, whole: Whole, upstream: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """From upstream gradients of (loss, lse, log_prob, entropy) to those of (loss, lse, entropy, target's logit)."""
    loss, lse, log_prob, entropy = upstream
    if log_prob is None:
        return loss, lse, entropy, None
    lse = torch.zeros_like(log_prob) if lse is None else lse
    if rows.spec.objective == Objective.INDEX:
        return loss, lse - log_prob, entropy, log_prob[:, None]
    # Of more than one class it is the negative loss, but for the z-loss.
    loss = -log_prob if loss is None else loss - log_prob
    return loss, lse + log_prob * 2 * rows.spec.z_loss * whole.lse, entropy, None
