"""The torch side that the GPU backends share: allocations, the order of launches, what is skipped.

A backend brings `Kernels`: functions that only launch, on the current stream of the tensors' device. Nothing here or
there waits for the device, so that a training step can be captured in a CUDA graph.

A row's bits depend on the row, the options and the device alone: not on the batch around it, nor on its place in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import COMPUTE_DTYPE, Objective, Reduction, Rows
from . import reference
from .native import readable

STATE_FIELDS = 5  # csrc/row_state.h: centre, sum, moment, plain, mass
STATS = 5  # centre, log_sum, log_prob, mass, entropy


class Upstream(NamedTuple):
    """Upstream gradients, in the compute dtype: (N,) of any stride, or None for zero. That of the loss may be a number,
    and is multiplied by the row's `token_weight` (N,) and divided by `denominator` (), where given."""

    loss: Tensor | float
    lse: Tensor | None = None
    log_prob: Tensor | None = None
    entropy: Tensor | None = None
    token_weight: Tensor | None = None
    denominator: Tensor | None = None


class Kernels(NamedTuple):
    """What a backend launches. Outputs are allocated by the caller; every row is written."""

    # (input, whether anything but the maximum and the sum of exponentials is wanted): can a row stay on chip?
    on_chip: Callable[[Tensor, bool], bool]
    # (rows, loss (N,), stats (STATS, N), argmax (N,) or None, extras)
    row_stats: Callable[[Rows, Tensor, Tensor, Tensor | None, bool], None]
    # (rows, stats, upstream, grad (N, V), unless_one): with `unless_one` nothing is written if upstream.loss is one
    row_grad: Callable[[Rows, Tensor, Upstream, Tensor, bool], None]
    # (rows, upstream, loss (N,), grad (N, V), unless_one): each row's gradient while the row is on chip
    row_loss_grad: Callable[[Rows, Upstream, Tensor, Tensor, bool], None]
    # (rows, token_weight, out ()): what a mean divides by, the summed weights of the rows that count
    denominator: Callable[[Rows, Tensor | None, Tensor], None]
    # (loss (N,), token_weight, denominator, out ()): the weighted sum, over the denominator if there is one
    total: Callable[[Tensor, Tensor | None, Tensor | None, Tensor], None]
    # (grad, upstream ()): grad *= upstream, untouched if that is one
    rescale: Callable[[Tensor, Tensor], None]


def lacks_kernels(objective: Objective) -> str | None:
    """Why no GPU backend computes such rows; None if they do."""
    if objective in (Objective.INDEX, Objective.PROBS):
        return None
    return f"has no kernel for {objective.name.lower()}"


def _general(rows: Rows) -> bool:
    """Whether the rows need more than the maximum and the sum of exponentials, and more than A p in the gradient."""
    return rows.spec.objective == Objective.PROBS or rows.spec.softcap > 0 or rows.spec.label_smoothing > 0


def _empty_grad(input: Tensor) -> Tensor:
    return torch.empty_like(input) if input.is_contiguous() else input.new_empty(input.shape)


def _stats(kernels: Kernels, rows: Rows, extras: bool) -> tuple[Tensor, Tensor, Tensor]:
    N = rows.input.shape[0]
    loss = rows.input.new_empty(N, dtype=rows.compute_dtype)
    stats = rows.input.new_empty((STATS, N), dtype=rows.compute_dtype)
    argmax = rows.input.new_empty(N if extras else 0, dtype=torch.int64)
    if N:
        kernels.row_stats(rows, loss, stats, argmax if extras else None, extras)
    return loss, stats, argmax


def row_loss(kernels: Kernels, rows: Rows, extras: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See reference.row_loss."""
    rank = reference.rank(rows) if extras else rows.input.new_empty(0, dtype=torch.int64)
    return *_stats(kernels, readable(rows), extras), rank


def row_grad(
    kernels: Kernels, rows: Rows, stats: Tensor, upstream: list[Tensor | None], out: Tensor | None = None
) -> Tensor:
    """See reference.row_grad."""
    grad = _empty_grad(rows.input) if out is None else out
    loss, *others = (None if g is None else g.to(stats.dtype) for g in upstream)
    if grad.numel():
        kernels.row_grad(readable(rows), stats, Upstream(0.0 if loss is None else loss, *others), grad, False)
    return grad


def row_loss_grad(
    kernels: Kernels,
    rows: Rows,
    to: Reduction,
    upstream: float | Tensor,
    need_grad: bool,
    out: Tensor | None = None,
    stats: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The reduced loss; its gradient, `upstream` times; and, where the rows did not stay on chip, their statistics, to
    be given back with another upstream. With a tensor upstream and an `out` that holds the gradient for an upstream of
    one, the device decides whether there is anything left to do, and the loss is not computed again."""
    input, rows = rows.input, readable(rows)
    N = input.shape[0]
    token_weight = None if to.token_weight is None else to.token_weight.contiguous()
    denominator = to.normalizer
    if denominator is None and to.kind == "mean":
        denominator = input.new_empty((), dtype=rows.compute_dtype)
        kernels.denominator(rows, token_weight, denominator)
    grad, again = out, isinstance(upstream, Tensor)
    if need_grad and grad is None:
        grad = _empty_grad(input)
    if isinstance(upstream, Tensor):
        upstream = upstream.to(rows.compute_dtype).expand(N)
    factors = Upstream(upstream, token_weight=token_weight, denominator=denominator)
    unless_one = again and out is not None
    loss = None
    if grad is not None and input.numel() and kernels.on_chip(rows.input, _general(rows)):
        loss = input.new_empty(N, dtype=rows.compute_dtype)
        kernels.row_loss_grad(rows, factors, loss, grad, unless_one)
    else:
        if stats is None:
            loss, stats, _ = _stats(kernels, rows, False)
        if grad is not None and input.numel():
            kernels.row_grad(rows, stats, factors, grad, unless_one)
    total = input.new_empty((), dtype=to.dtype if to.dtype in COMPUTE_DTYPE else rows.compute_dtype)
    if loss is not None and not again:
        kernels.total(loss, token_weight, denominator, total)
    return total.to(to.dtype), grad, stats


def rescale(kernels: Kernels, grad: Tensor, upstream: Tensor) -> Tensor:
    """grad *= upstream, in place; nothing is touched if that is one."""
    if grad.numel():
        kernels.rescale(grad, upstream.to(COMPUTE_DTYPE[grad.dtype]))
    return grad
