"""The gradient of a 16-bit head, some classes at a time.

Its sums over rows are float32, twice the size of what they become. Where that is more than the logits that may exist at
once, a block of classes is summed over all rows and rounded before the next: the kernels know how to take a part of a
vocabulary (fastloss/parallel/merge.py). The logits are made again for it, so the loss keeps statistics, not gradients.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..parallel.merge import Log, Part, Whole, rest_of, rows_of
from ..spec import COMPUTE_DTYPE, Objective, Rows
from .heads import (
    HeadGrads,
    LinearRows,
    empty,
    equal_parts,
    grads_on_chip,
    not_asked_for,
    row_bytes,
    sum_up,
    write_part,
)

_PANEL = 64  # blocks are whole panels of the matrix product's, of any instruction set


def needed(given: LinearRows, needs: list[bool]) -> bool:
    """Whether the weight's gradient is summed in more memory than its logits may take."""
    weight = given.head.weight
    wide = COMPUTE_DTYPE[given.head.dtype].itemsize
    if not (needs[1] and weight.dtype.itemsize < wide and weight.numel() * wide > _budget(given)):
        return False
    backend = given.backend()
    filters = given.filter_eps > 0 and grads_on_chip(given, backend)  # by tiles of all rows and classes
    return backend.in_parts and not filters


def _budget(given: LinearRows) -> int:
    """Bytes that logits may take."""
    return given.limit * row_bytes(given.head.weight.shape[0], given.head.dtype, given.teacher is not None)


def _parts(given: LinearRows) -> list[Part]:
    """Equal blocks of classes, whose sums take half of the budget."""
    V, H = given.head.weight.shape
    most = max(_budget(given) // (2 * H * COMPUTE_DTYPE[given.head.dtype].itemsize), 1)
    size = equal_parts(V, most, _PANEL)
    return [Part(start, min(start + size, V), V) for start in range(0, V, size)]


def row_grads(given: LinearRows, stats: Tensor, upstream: list[Tensor | None], needs: list[bool]) -> list[Tensor]:
    """As heads.row_grads, but the weight's in its own dtype."""
    head, dtype = given.head, COMPUTE_DTYPE[given.head.dtype]
    skipped = not_asked_for(given.rows, upstream)
    shapes = head.grad_shapes(needs)
    hidden = torch.zeros(shapes[0], dtype=dtype, device=head.hidden.device)
    weight = empty(shapes[1], head.weight.dtype, head.hidden.device)
    bias = torch.empty(shapes[2], dtype=dtype, device=head.hidden.device)
    whole = _whole(given.rows, stats)
    of_outcome = _of_outcome(given.rows, whole, upstream)
    for part in _parts(given):
        block = _block(given, part)
        grads = HeadGrads(block.head, needs, given.backend().matmul, hidden=hidden)
        write = partial(write_part, given, part, whole, of_outcome)
        _, *found = sum_up(block, grads, write, skipped)
        for to, grad in zip((weight, bias), found, strict=True):
            if to.numel():
                to[part.start : part.stop] = grad
    return [hidden, weight, bias]


def _block(given: LinearRows, part: Part) -> LinearRows:
    """Of the classes of a part, as if there were no others."""
    classes = slice(part.start, part.stop)
    head = given.head.of_classes(part.start, part.stop)
    teacher = None if given.teacher is None else given.teacher.of_classes(part.start, part.stop)
    rows = given.rows
    target = rows.target if rows.spec.objective.indexed else rows.target[:, classes]
    weight = None if rows.weight is None else rows.weight[classes]
    local = rows_of(rows._replace(input=rows.input[:, classes], target=target, weight=weight), part)
    # As many rows as the other half of the budget holds.
    row = row_bytes(part.size, head.dtype, teacher is not None)
    return LinearRows(local, head, teacher, max(1, _budget(given) // (2 * row)))


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
