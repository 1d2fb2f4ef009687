"""The functions of `Kernels`: which kernel, cut how, on how many warps; and the small kernels over N.

Slices depend on the classes and the dtype alone: a row's bits must not depend on the batch around it.
"""
# mypy: ignore-errors

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import Objective, Rows
from ...strides import count_rows, lines_of
from ..device import Upstream, captures
from . import row_kernels
from .capture import loading_allowed
from .row_kernels import kernel, line

# debug: an index out of range is an error, as in torch's own kernels. The rest only where it would change bits or warn.
OPTIONS = {"debug": True, "sanitize_overflow": False, "enable_fp_fusion": True}
_ACCESS = 16  # bytes at once
WARPS = 16  # at most, with up to 128 registers a thread
PART = 32768  # elements whose gradient one program writes
_MANY = 1024  # elements of a block of the kernels over N


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if x.device.type == "cpu":
        return nullcontext()
    there: AbstractContextManager[Any] = getattr(torch, x.device.type).device(x.device)
    if not captures(x.device):
        return there
    stack = ExitStack()
    stack.enter_context(there)
    stack.enter_context(loading_allowed())
    return stack


def elements_of(dtype: torch.dtype, wanted: int) -> int:
    """How many of a row's elements one thread holds: as many as spilled no registers, on any of the architectures that
    the tests compile for."""
    return wanted // 4 if dtype == torch.float64 else wanted


def warps_of(block: int, elements: int) -> int:
    return max(1, min(WARPS, block // (32 * elements)))


def block_of(V: int, largest: int) -> int:
    return min(max(triton.next_power_of_2(V), 16), largest)


def vector_of(V: int, *matrices: Tensor) -> int:
    """How many elements of each row one access takes: what divides V, and the distances of rows and of their groups."""
    vector = _ACCESS // min(t.element_size() for t in matrices)
    ends = [V] + [end for t in matrices for end in _ends(t)]
    aligned = all(t.data_ptr() % _ACCESS == 0 for t in matrices) and all(end % vector == 0 for end in ends)
    return vector if aligned else 1


def _ends(matrix: Tensor) -> list[int]:
    stride, group, outer = lines_of(matrix)
    return [stride, outer] if group else [stride]


def lines(matrix: Tensor | None) -> tuple[int, int | None, int]:
    """Where rows lie, as `row_kernels.line` takes it: without groups it is compiled for rows at one stride."""
    stride, group, outer = (0, 0, 0) if matrix is None else lines_of(matrix)
    return stride, group or None, outer


def _read(rows: Rows) -> tuple[Tensor, ...]:
    """What is read by rows of V."""
    return (rows.input, rows.target) if _soft(rows) else (rows.input,)


def _soft(rows: Rows) -> bool:
    return rows.spec.objective == Objective.PROBS


def is_general(rows: Rows) -> bool:
    return _soft(rows) or rows.spec.softcap > 0 or rows.spec.label_smoothing > 0


def strided(vector: Tensor | None) -> tuple[Tensor | None, int]:
    return vector, 0 if vector is None else vector.stride(0)


def upstream_of(g: Upstream) -> tuple[Any, ...]:
    number = 0.0 if isinstance(g.loss, Tensor) else g.loss
    loss = strided(g.loss if isinstance(g.loss, Tensor) else None)
    return (*loss, number, *strided(g.token_weight), g.denominator)


def _target_lines(rows: Rows) -> tuple[int, int | None, int]:
    return lines(rows.target if _soft(rows) else None)


def on_chip(rows: Rows) -> bool:
    """Whether a row's numbers fit into the registers of a program."""
    return rows.input.shape[-1] <= 32 * WARPS * elements_of(rows.input.dtype, 16 if is_general(rows) else 64)


def row_loss_grad(rows: Rows, upstream: Upstream, loss: Tensor, grad: Tensor, unless_one: bool) -> None:
    """See Kernels."""
    x, N, V, general = rows.input, rows.N, rows.V, is_general(rows)
    elements = elements_of(x.dtype, 16 if general else 64)
    block = block_of(V, 32 * WARPS * elements)
    with on(x):
        row_kernels.row_loss_grad[(N,)](
            x, *lines(x), rows.target, *_target_lines(rows), rows.weight, V, *rows.spec[:5],
            *upstream_of(upstream), int(unless_one), loss, grad, *lines(grad),
            GENERAL=general, BLOCK=block, VECTOR=vector_of(V, *_read(rows), grad), num_warps=warps_of(block, elements),
            **OPTIONS,
        )  # fmt: skip


def row_states(rows: Rows, dtype: torch.dtype, general: bool, extras: bool) -> tuple[Tensor, int]:
    """States (N, slices, STATE) of slices of rows, and their length."""
    x, N, V, listed = rows.input, rows.N, rows.V, rows.probs is not None
    ignore_index, eps, _, cap, scale = rows.spec[:5]
    elements = elements_of(x.dtype, 32 if general or extras else 64)
    block = block_of(V, (32 if x.dtype == torch.float64 else 16) * WARPS * elements)
    slices = max(1, triton.cdiv(V, block))
    states = x.new_empty((N, slices, row_kernels.STATE.value), dtype=dtype)
    with on(x):
        row_kernels.row_states[(N, slices)](
            x, *lines(x), rows.target, *_target_lines(rows), rows.weight, V, ignore_index, eps, cap, scale,
            states, slices, rows.target.shape[1] if listed else 1, GENERAL=general, EXTRAS=extras, LISTED=listed,
            TAIL=rows.spec.objective == Objective.TOPK_TAIL, BLOCK=block, VECTOR=vector_of(V, *_read(rows)),
            num_warps=warps_of(block, elements), **OPTIONS,
        )  # fmt: skip
    return states, block


def row_stats(rows: Rows, loss: Tensor, stats: Tensor, argmax: Tensor | None, rank: Tensor | None) -> None:
    """See Kernels."""
    states, block = row_states(rows, loss.dtype, is_general(rows), argmax is not None)
    finish(rows, rows.input, states, block, loss, stats, argmax, rank)


def finish(
    rows: Rows,
    x: Tensor | None,
    states: Tensor,
    block: int,
    loss: Tensor,
    stats: Tensor,
    argmax: Tensor | None,
    rank: Tensor | None,
) -> None:
    """Losses and statistics from the states (N, slices, STATE) of slices of `block` classes."""
    N, V, slices = rows.N, rows.V, states.shape[1]
    merged = triton.next_power_of_2(slices)
    together = max(1, min(32, 32 * elements_of(rows.input.dtype, 8) // merged))  # rows whose states one warp merges
    with on(loss):
        row_kernels.row_finish[(triton.cdiv(N, together),)](
            x, *lines(x), rows.target, rows.weight, V, N, *rows.spec[:5], states, slices,
            loss, stats, argmax, rank, GENERAL=is_general(rows), EXTRAS=argmax is not None, BLOCK=block, ROWS=together,
            SLICES=merged,
            num_warps=1, **OPTIONS,
        )  # fmt: skip


def row_grad(rows: Rows, stats: Tensor, upstream: Upstream, grad: Tensor, unless_one: bool) -> None:
    """See Kernels."""
    x, N, V = rows.input, rows.N, rows.V
    general = is_general(rows) or upstream.entropy is not None
    elements = elements_of(x.dtype, 16 if general else 64)
    block = block_of(V, 4 * 32 * elements)
    with on(x):
        row_kernels.row_grad[(N, triton.cdiv(V, PART))](
            x, *lines(x), rows.target, *_target_lines(rows), rows.weight, V, N, *rows.spec[:5],
            *upstream_of(upstream), int(unless_one),
            *strided(upstream.lse), *strided(upstream.log_prob), *strided(upstream.entropy),
            stats, grad, *lines(grad),
            GENERAL=general, BLOCK=block, PART=PART, VECTOR=vector_of(V, *_read(rows), grad),
            num_warps=warps_of(block, elements), **OPTIONS,
        )  # fmt: skip


# ---- over N ----------------------------------------------------------------------------------------------------------


@kernel
def _denominator(
    target, weight, V, N: tl.int64, ignore_index: tl.int64, token_weight, token_stride: tl.int64, out, picks,
    LISTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    F: tl.constexpr = out.dtype.element_ty
    sums = tl.zeros((BLOCK,), F)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        counts = i < N
        if LISTED:
            some = i < 0
            for k in range(picks):
                some |= tl.load(target + i * picks + k, mask=counts, other=ignore_index) != ignore_index
            counts &= some
        elif not target.dtype.element_ty.is_floating():
            y = tl.load(target + i, mask=counts, other=ignore_index)
            counts = counts & (y != ignore_index)
        w = tl.full((BLOCK,), 1.0, F)
        if token_weight is not None:
            w = tl.load(token_weight + i * token_stride, mask=counts, other=0.0)
        if weight is not None and not target.dtype.element_ty.is_floating() and not LISTED:
            w *= tl.load(weight + y, mask=counts & (y >= 0) & (y < V), other=0.0)
        sums += tl.where(counts, w, 0.0)
    tl.store(out, tl.sum(sums, 0))


@kernel
def _total(loss, N: tl.int64, token_weight, token_stride: tl.int64, denominator, out, BLOCK: tl.constexpr):
    sums = tl.zeros((BLOCK,), loss.dtype.element_ty)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        value = tl.load(loss + i, mask=i < N, other=0.0)
        if token_weight is not None:
            w = tl.load(token_weight + i * token_stride, mask=i < N, other=0.0)
            # An ignored row stays zero under an infinite weight, and one of no weight whatever it holds.
            value = tl.where((value == 0) | (w == 0), 0.0, value * w)
        sums += value
    total = tl.sum(sums, 0)
    if denominator is not None:
        total /= tl.load(denominator)
    tl.store(out, total)


@kernel
def _rescale(
    grad, grad_stride: tl.int64, grad_group, grad_outer: tl.int64, V, upstream,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    g = tl.load(upstream)
    if g == 1:
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V // VECTOR * VECTOR
    p = grad + line(tl.program_id(0).to(tl.int64), grad_stride, grad_group, grad_outer, VECTOR) + columns
    tl.store(p, tl.load(p, mask=inside).to(upstream.dtype.element_ty) * g, mask=inside)


def denominator(rows: Rows, token_weight: Tensor | None, out: Tensor) -> None:
    """See Kernels."""
    N, V = rows.N, rows.V
    # Targets that are logits, like class probabilities, have no row that is ignored.
    picks = rows.target.shape[1] if rows.probs is not None else 1
    weights = rows.weight, V, N, rows.spec.ignore_index, *strided(token_weight)
    with on(out):
        _denominator[(1,)](rows.target, *weights, out, picks, LISTED=rows.probs is not None, BLOCK=_MANY, **OPTIONS)


def total(loss: Tensor, token_weight: Tensor | None, denominator: Tensor | None, out: Tensor) -> None:
    """See Kernels."""
    with on(out):
        _total[(1,)](loss, loss.shape[0], *strided(token_weight), denominator, out, BLOCK=_MANY, **OPTIONS)


def rescale(grad: Tensor, upstream: Tensor) -> None:
    """See Kernels."""
    N, V = count_rows(grad), grad.shape[-1]
    elements = elements_of(grad.dtype, 64)
    block = block_of(V, 4 * 32 * elements)
    with on(grad):
        _rescale[(N, triton.cdiv(V, block))](
            grad, *lines(grad), V, upstream, BLOCK=block, VECTOR=vector_of(V, grad),
            num_warps=warps_of(block, elements), **OPTIONS,
        )  # fmt: skip
