"""The launches of head_kernels.py."""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...spec import Rows
from ..device import Tiles, Upstream, set_first
from . import head_kernels
from .row_kernels import STATE
from .rows import OPTIONS, finish, is_general, on, strided, vector_of

SLICE = 2048  # classes of a state
# A tile of the gradient of logits, which is kept or left out: whole, half as many rows where a loss needs registers.
ROWS, COLUMNS = 128, 128


def head_stats(
    rows: Rows,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    loss: Tensor,
    stats: Tensor,
    argmax: Tensor | None,
    order: Tensor,
) -> None:
    """As row_stats, of rows whose logits are hidden (N, H) @ head (V, H).T + bias (V,), H contiguous."""
    (N, H), V, extras = hidden.shape, head.shape[0], argmax is not None
    slices = max(1, triton.cdiv(V, SLICE))
    states = hidden.new_empty((N, slices, STATE.value), dtype=loss.dtype)
    ignore_index, eps, _, cap, scale = rows.spec[:5]
    general = is_general(rows)
    with on(hidden):
        head_kernels.head_states[lambda meta: (triton.cdiv(N, meta["ROWS"]), slices)](
            hidden, hidden.stride(0), head, head.stride(0), bias, rows.target, rows.weight, V, N, H, V.bit_length(),
            ignore_index, eps, cap, scale, order, states, slices,
            GENERAL=general, EXTRAS=extras, SLICE=SLICE, VECTOR=vector_of(H, hidden, head), **OPTIONS,
        )  # fmt: skip
    finish(rows, None, states, SLICE, loss, stats, argmax, None)


def head_tiles(rows: Rows, upstream: Upstream) -> tuple[int, int]:
    """Of the gradient of logits."""
    return ROWS // 2 if is_general(rows) or upstream.entropy is not None else ROWS, COLUMNS


def head_grad(
    rows: Rows,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    stats: Tensor,
    upstream: Upstream,
    grad: Tensor,
    kept: Tensor | None,
    filter_eps: float,
) -> None:
    """As row_grad, of rows whose logits are hidden (N, H) @ head (V, H).T + bias (V,), H contiguous."""
    (N, H), V = hidden.shape, head.shape[0]
    height, width = head_tiles(rows, upstream)
    vectors = [strided(vector if isinstance(vector, Tensor) else None) for vector in upstream[:4]]
    with on(hidden):
        head_kernels.head_grad[(triton.cdiv(N, height), triton.cdiv(V, width))](
            hidden, hidden.stride(0), head, head.stride(0), bias, rows.target, rows.weight, V, N, H, V.bit_length(),
            *rows.spec[:5], *sum(vectors, ()), stats, grad, grad.stride(0), kept, filter_eps,
            GENERAL=height < ROWS, ROWS=height, COLUMNS=width, VECTOR=vector_of(H, hidden, head),
            GRAD_VECTOR=vector_of(V, grad), **OPTIONS,
        )  # fmt: skip


def kept_product(grad: Tensor, tiles: Tiles, other: Tensor, out: Tensor, add: bool) -> None:
    """`out` (M, H) = grad (M, K) @ other (K, H) over the tiles that are kept, or with `add` more by that."""
    (M, K), H = grad.shape, other.shape[1]
    kept = tiles.kept.contiguous()
    counts = kept.sum(1, dtype=torch.int32)
    order = set_first(kept).to(torch.int32)
    height, deep = tiles.size
    lines = grad.t() if tiles.transposed else grad
    V = lines.shape[1]
    with on(grad):
        head_kernels.kept_product[lambda meta: (triton.cdiv(H, meta["COLUMNS"]), triton.cdiv(M, height))](
            lines, lines.stride(0), other, other.stride(0), order, counts, order.shape[1], out, out.stride(0), M, K, H,
            V.bit_length(), TRANSPOSED=tiles.transposed, ADD=add, ROWS=height, TILE=deep,
            VECTOR=vector_of(H, other, out), GRAD_VECTOR=vector_of(V, lines), **OPTIONS,
        )  # fmt: skip
