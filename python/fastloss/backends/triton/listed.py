"""The functions of `Kernels` for targets that list classes (top-k); see rows.py."""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from ...spec import Objective, Rows
from ..device import Upstream
from . import listed_kernels
from .rows import (
    OPTIONS,
    PART,
    WARPS,
    block_of,
    elements_of,
    lines,
    on,
    row_states,
    strided,
    upstream_of,
    vector_of,
    warps_of,
)


def is_general(rows: Rows) -> bool:
    return rows.spec.softcap > 0 or rows.spec.label_smoothing > 0


def _held(rows: Rows, general: bool) -> int:
    return elements_of(rows.input.dtype, 16 if general else 32)


def _operands(rows: Rows) -> tuple[Any, ...]:
    x, target = rows.input, rows.target
    return x, *lines(x), target, rows.probs, target.shape[1], rows.weight, rows.V


def _list(rows: Rows, warps: int) -> dict[str, Any]:
    """The list is as long as there are threads: of a shorter one each element would lie in several."""
    picks = max(32 * warps, rows.target.shape[1])
    tail = rows.spec.objective == Objective.TOPK_TAIL
    return {"TAIL": tail, "PICKS": triton.next_power_of_2(picks), "num_warps": warps, **OPTIONS}


def on_chip(rows: Rows) -> bool:
    """Whether a row's numbers fit into the registers of a program."""
    return rows.input.shape[-1] <= 32 * WARPS * _held(rows, is_general(rows))


def row_loss_grad(rows: Rows, upstream: Upstream, loss: Tensor, grad: Tensor, unless_one: bool) -> None:
    """See Kernels."""
    x, N, V, general = rows.input, rows.N, rows.V, is_general(rows)
    elements = _held(rows, general)
    block = block_of(V, 32 * WARPS * elements)
    with on(x):
        listed_kernels.listed_loss_grad[(N,)](
            *_operands(rows), *rows.spec[:5], *upstream_of(upstream), int(unless_one), loss, grad, *lines(grad),
            GENERAL=general, BLOCK=block, VECTOR=vector_of(V, x, grad), **_list(rows, warps_of(block, elements)),
        )  # fmt: skip


def row_stats(rows: Rows, loss: Tensor, stats: Tensor, argmax: Tensor | None, rank: Tensor | None) -> None:
    """See Kernels. The rank is that of one class."""
    N, general, extras = rows.N, is_general(rows), argmax is not None
    states, block = row_states(rows, loss.dtype, general, extras)
    slices = states.shape[1]
    with on(loss):
        listed_kernels.listed_finish[(N,)](
            *_operands(rows), N, *rows.spec[:5], states, slices, loss, stats, argmax,
            GENERAL=general, EXTRAS=extras, BLOCK=block, SLICES=triton.next_power_of_2(slices), **_list(rows, 1),
        )  # fmt: skip


def row_grad(rows: Rows, stats: Tensor, upstream: Upstream, grad: Tensor, unless_one: bool) -> None:
    """See Kernels."""
    x, N, V = rows.input, rows.N, rows.V
    general = is_general(rows) or upstream.entropy is not None
    elements = _held(rows, general)
    block = block_of(V, 4 * 32 * elements)
    with on(x):
        listed_kernels.listed_grad[(N, triton.cdiv(V, PART))](
            *_operands(rows), N, *rows.spec[:5], *upstream_of(upstream), int(unless_one),
            *strided(upstream.lse), *strided(upstream.entropy), stats, grad, *lines(grad),
            GENERAL=general, BLOCK=block, PART=PART, VECTOR=vector_of(V, x, grad),
            **_list(rows, warps_of(block, elements)),
        )  # fmt: skip
