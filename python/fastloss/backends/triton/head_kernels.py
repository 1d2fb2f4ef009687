"""Logits that are never written: tiles of a product of hidden states and the last layer go from the tensor cores
straight into the states of their rows."""
# mypy: ignore-errors

import triton.language as tl

from .loss import squashed, times, unit_of
from .row_kernels import NOTHING, STATE, kernel, label, number, weights
from .state import LOG2E, distance, recentre


@kernel
def head_states(
    hidden, hidden_stride: tl.int64, head, head_stride: tl.int64, bias, target, weight, V, N: tl.int64, H,
    ignore_index: tl.int64, label_smoothing: tl.float64, softcap: tl.float64, logit_scale: tl.float64, states, slices,
    GENERAL: tl.constexpr, EXTRAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    TILES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid (N / ROWS, slices). The states of ROWS rows over TILES tiles of COLUMNS classes, as row_states has them, and
    the target's logit; H numbers deep, DEPTH at a time."""
    F: tl.constexpr = states.dtype.element_ty
    row, slice = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    here, begin = row < N, slice * TILES * COLUMNS
    y, ignored = label(tl.load(target + row, mask=here, other=ignore_index), V, ignore_index)
    if not EXTRAS:  # noqa: SIM102 - one is known to the compiler, the other is not
        if tl.min(ignored.to(tl.int32), 0) == 1:
            return
    classes, cap, scale, eps = V.to(F), number(softcap, F), number(logit_scale, F), number(label_smoothing, F)
    unit = scale
    if GENERAL:
        unit = unit_of(cap, scale)
    H = H // VECTOR * VECTOR
    hidden += row[:, None] * (hidden_stride // VECTOR * VECTOR)
    centre, sums, z_y = tl.full((ROWS,), NOTHING, F), tl.zeros((ROWS,), F), tl.zeros((ROWS,), F)
    moment, plain, mass, column = tl.zeros_like(sums), tl.zeros_like(sums), tl.zeros_like(sums), tl.zeros_like(sums)
    for tile in range(TILES):
        columns = begin + tile * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < V
        across = columns[None, :].to(tl.int64) * (head_stride // VECTOR * VECTOR)
        z = tl.zeros((ROWS, COLUMNS), F)
        for k in range(0, H, DEPTH):
            depth = k + tl.arange(0, DEPTH)
            a = tl.load(hidden + depth[None, :], mask=here[:, None] & (depth < H)[None, :], other=0.0)
            b = tl.load(head + across + depth[:, None], mask=inside[None, :] & (depth < H)[:, None], other=0.0)
            z = tl.dot(a, b, z)
        if bias is not None:
            z += tl.load(bias + columns, mask=inside, other=0.0).to(F)[None, :]
        if GENERAL:
            z = squashed(z, cap, scale)
        z = tl.where(inside[None, :], z, NOTHING)
        z_y += tl.sum(tl.where(columns[None, :] == y[:, None], z, 0.0), 1)
        top = tl.max(z, 1)
        larger = tl.maximum(centre, top)
        sums, moment, plain = recentre(sums, moment, plain, mass, distance(centre, larger, unit))
        r = z - tl.where(larger == NOTHING, 0.0, larger)[:, None]
        e = tl.exp2(r * (unit * LOG2E))
        sums += tl.sum(e, 1)
        if EXTRAS:
            moment += tl.sum(times(e, r), 1) * unit
            first = tl.min(tl.where(z == top[:, None], columns[None, :], V), 1)
            column = tl.where(top > centre, (first - begin).to(F), column)
        if GENERAL:
            w = weights(weight, None, columns, V, classes, eps, F)
            plain += tl.sum(times(w[None, :], r * unit), 1)
            mass += tl.sum(w, 0)
        centre = larger
    states += (row * slices + slice) * STATE
    tl.store(states, centre, mask=here)
    tl.store(states + 1, sums, mask=here)
    if EXTRAS:
        tl.store(states + 2, moment, mask=here)
        tl.store(states + 5, column, mask=here)
    if GENERAL:
        tl.store(states + 3, plain, mask=here)
        tl.store(states + 4, mass, mask=here)
    tl.store(states + 6, z_y, mask=here)
