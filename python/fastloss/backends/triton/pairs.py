"""The functions of `Kernels` for targets that are logits; see rows.py."""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from ...spec import Objective, Rows
from ..device import Upstream
from . import pair_kernels
from .rows import OPTIONS, PART, WARPS, block_of, elements_of, lines, on, strided, upstream_of, vector_of, warps_of

_HELD = 8  # elements of either row that one thread holds


def _direction(rows: Rows) -> dict[str, bool]:
    objective = rows.spec.objective
    return {"FORWARD": objective == Objective.FORWARD_KL, "REVERSE": objective == Objective.REVERSE_KL}


def _operands(rows: Rows) -> tuple[Any, ...]:
    x, u = rows.input, rows.target
    return x, *lines(x), u, *lines(u), rows.V


def on_chip(rows: Rows) -> bool:
    """Whether both rows' numbers fit into the registers of a program."""
    return rows.input.shape[-1] <= 32 * WARPS * elements_of(rows.input.dtype, _HELD)


def row_loss_grad(rows: Rows, upstream: Upstream, loss: Tensor, grad: Tensor, unless_one: bool) -> None:
    """See Kernels."""
    x, N, V, spec = rows.input, rows.N, rows.V, rows.spec
    elements = elements_of(x.dtype, _HELD)
    block = block_of(V, 32 * WARPS * elements)
    with on(x):
        pair_kernels.pair_loss_grad[(N,)](
            *_operands(rows), spec.z_loss, spec.softcap, spec.logit_scale, spec.target_scale, spec.beta,
            *upstream_of(upstream), int(unless_one), loss, grad, *lines(grad), **_direction(rows),
            BLOCK=block, VECTOR=vector_of(V, x, rows.target, grad), num_warps=warps_of(block, elements), **OPTIONS,
        )  # fmt: skip


def row_stats(
    rows: Rows, loss: Tensor, stats: Tensor, argmax: Tensor | None, rank: Tensor | None, whole: bool = False
) -> None:
    """See Kernels. There is no argmax of a pair of rows."""
    x, N, V, spec = rows.input, rows.N, rows.V, rows.spec
    elements = elements_of(x.dtype, _HELD)
    block = block_of(V, 32 * WARPS * elements)
    slices = max(1, triton.cdiv(V, block))
    states = loss.new_empty((N, slices, pair_kernels.PAIR_STATE.value))
    cut = {"BLOCK": block, "VECTOR": vector_of(V, x, rows.target), "num_warps": warps_of(block, elements), **OPTIONS}
    merged = triton.next_power_of_2(slices)
    together = {"ROWS": max(1, min(32, 256 // merged)), "SLICES": merged, "num_warps": 1, **OPTIONS}
    grid, shape = (triton.cdiv(N, together["ROWS"]),), (spec.softcap, spec.logit_scale, spec.target_scale)
    with on(x):
        if not whole:
            forward = spec.objective == Objective.FORWARD_KL
            pair_kernels.pair_states[(N, slices)](*_operands(rows), *shape, states, slices, FORWARD=forward, **cut)
            pair_kernels.pair_finish[grid](
                N, spec.z_loss, *shape, states, slices, loss, stats, **_direction(rows), **together
            )
        if spec.objective == Objective.JS:
            pair_kernels.pair_mixtures[(N, slices)](
                *_operands(rows), N, *shape, spec.beta, stats, states, slices, **cut
            )
            pair_kernels.pair_mixed[grid](N, spec.z_loss, states, slices, loss, stats, **together)


def row_grad(rows: Rows, stats: Tensor, upstream: Upstream, grad: Tensor, unless_one: bool) -> None:
    """See Kernels."""
    x, N, V, spec = rows.input, rows.N, rows.V, rows.spec
    elements = elements_of(x.dtype, _HELD)
    block = block_of(V, 4 * 32 * elements)
    with on(x):
        pair_kernels.pair_grad[(N, triton.cdiv(V, PART))](
            *_operands(rows), N, spec.z_loss, spec.softcap, spec.logit_scale, spec.target_scale, spec.beta,
            *upstream_of(upstream), int(unless_one), *strided(upstream.lse), stats, grad, *lines(grad),
            **_direction(rows), BLOCK=block, PART=PART, VECTOR=vector_of(V, x, rows.target, grad),
            num_warps=warps_of(block, elements), **OPTIONS,
        )  # fmt: skip
