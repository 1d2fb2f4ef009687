"""Logits that are never written: tiles of a product of hidden states and the last layer go from the tensor cores
straight into the states of their rows or, made again, into their gradient; and that gradient's products.

`size` is the magnitude of V, which no kernel reads: their shapes are chosen for it.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from .loss import coefficients, slope, squashed, times, unit_of
from .row_kernels import NOTHING, STATE, at, kernel, label, number, weights
from .state import LOG2E, distance, recentre
from .tuning import restored, tuned


def shape(num_warps: int, num_stages: int, **constants: int) -> triton.Config:
    """To be timed. None needs more shared memory than an A100, H100 or B200 has; Triton leaves out what another device
    cannot launch. None spills registers, but for one that Triton 3.6 spills on sm_80 (docs/gpu.md)."""
    return triton.Config(constants, num_warps=num_warps, num_stages=num_stages)


def in_registers(configs: list[triton.Config], meta: dict[str, int]) -> list[triton.Config]:
    """Those of at most 64 accumulators a thread, half as many where a loss or its statistics need registers."""
    most = 32 * (32 if meta["GENERAL"] or meta.get("EXTRAS") else 64)
    return [c for c in configs if c.kwargs["ROWS"] * c.kwargs["COLUMNS"] <= most * c.num_warps]


@triton.jit
def product(
    hidden, across, bias, here, columns, V, H, softcap, logit_scale,
    F: tl.constexpr, GENERAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of logits as `squashed`, from where its rows of hidden states (ROWS, 1) and of the last layer (1, COLUMNS)
    begin; nothing past the last column."""
    inside = columns < V
    z = tl.zeros((ROWS, COLUMNS), F)
    for k in range(0, H, DEPTH):
        depth = k + tl.arange(0, DEPTH)
        a = tl.load(hidden + depth[None, :], mask=here[:, None] & (depth < H)[None, :], other=0.0)
        b = tl.load(across + depth[:, None], mask=inside[None, :] & (depth < H)[:, None], other=0.0)
        z = tl.dot(a, b, z)
    if bias is not None:
        z += tl.load(bias + columns, mask=inside, other=0.0).to(F)[None, :]
    if GENERAL:
        z = squashed(z, softcap, logit_scale)
    return tl.where(inside[None, :], z, NOTHING)


@tuned(
    [
        shape(8, 3, ROWS=128, COLUMNS=128, DEPTH=64),
        shape(8, 3, ROWS=64, COLUMNS=128, DEPTH=64),
        shape(8, 4, ROWS=64, COLUMNS=128, DEPTH=64),
        shape(8, 4, ROWS=128, COLUMNS=64, DEPTH=64),
    ],
    ["H", "size", "GENERAL", "EXTRAS", "VECTOR"],
    in_registers,
)
@kernel
def head_states(
    hidden, hidden_stride: tl.int64, head, head_stride: tl.int64, bias, target, weight, V, N: tl.int64, H, size,
    ignore_index: tl.int64, label_smoothing: tl.float64, softcap: tl.float64, logit_scale: tl.float64, order, states,
    slices, GENERAL: tl.constexpr, EXTRAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    SLICE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid (N / ROWS, slices). The states of ROWS rows over SLICE classes, COLUMNS at a time, as row_states has them,
    and the target's logit; H numbers deep, DEPTH at a time. Rows come in an `order` (N,) in which those that are
    ignored are the last: whole programs of them have nothing to do."""
    F: tl.constexpr = states.dtype.element_ty
    row, slice = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    here, begin = row < N, slice * SLICE
    row = tl.load(order + row, mask=here, other=0)
    y, ignored = label(tl.load(target + row, mask=here, other=ignore_index), V, ignore_index)
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
    for tile in range(SLICE // COLUMNS):
        columns = begin + tile * COLUMNS + tl.arange(0, COLUMNS)
        across = head + columns[None, :].to(tl.int64) * (head_stride // VECTOR * VECTOR)
        z = product(hidden, across, bias, here, columns, V, H, cap, scale, F, GENERAL, ROWS, COLUMNS, DEPTH)
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


@triton.jit
def gradient(
    z, columns, y, V, weight, classes, eps, centre, log_sum, log_p, A, E, B, C, softcap, logit_scale,
    F: tl.constexpr, GENERAL: tl.constexpr,
):  # fmt: skip
    """Of a tile of logits, from its rows' statistics and coefficients. The target's own entry, where A p and B nearly
    cancel, is made from the log-probability."""
    own, unit = columns[None, :] == y[:, None], unit_of(softcap, logit_scale)
    r = tl.where(own, (log_p + log_sum)[:, None], z * unit - centre[:, None])
    p = tl.exp2(tl.where(own, log_p[:, None], r - log_sum[:, None]) * LOG2E)
    dx = A[:, None] * p
    if GENERAL:
        w = weights(weight, None, columns, V, classes, eps, F)
        dx += E[:, None] * tl.where(p > 0, r, 0.0) * p - C[:, None] * w[None, :]
    dx -= tl.where(own, B[:, None], 0.0)
    if GENERAL:
        dx = slope(dx, z, softcap)
    return dx


@tuned(
    [shape(8, 3, DEPTH=64), shape(8, 4, DEPTH=32), shape(8, 4, DEPTH=64)],
    ["H", "size", "GENERAL", "VECTOR", "GRAD_VECTOR"],
)
@kernel
def head_grad(
    hidden, hidden_stride: tl.int64, head, head_stride: tl.int64, bias, target, weight, V, N: tl.int64, H, size,
    ignore_index: tl.int64, label_smoothing: tl.float64, z_loss: tl.float64, softcap: tl.float64,
    logit_scale: tl.float64,
    g, g_stride: tl.int64, lse, lse_stride: tl.int64, log_prob, log_prob_stride: tl.int64,
    entropy, entropy_stride: tl.int64,
    stats, grad, grad_stride: tl.int64, kept, filter_eps: tl.float64,
    GENERAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, VECTOR: tl.constexpr,
    GRAD_VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid (N / ROWS, V / COLUMNS). The gradient of a tile of logits, from its rows' statistics as row_grad has it.
    With `kept` (grid) a tile whose every entry is smaller than filter_eps times its row's upstream gradients is zero.
    """
    F: tl.constexpr = stats.dtype.element_ty
    row, columns = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    here, columns = row < N, tl.program_id(1) * COLUMNS + columns
    i = tl.where(here, row, 0)
    y, ignored = label(tl.load(target + row, mask=here, other=ignore_index), V, ignore_index)
    up, up_log_prob = at(g, i * g_stride, 0.0, F), at(log_prob, i * log_prob_stride, 0.0, F)
    up_lse, up_entropy = at(lse, i * lse_stride, 0.0, F), at(entropy, i * entropy_stride, 0.0, F)
    up, up_log_prob = tl.where(ignored, 0.0, up), tl.where(ignored, 0.0, up_log_prob)
    counts = here & (ignored == 0)
    up_lse, up_entropy = tl.where(counts, up_lse, 0.0), tl.where(counts, up_entropy, 0.0)
    asked = tl.abs(up) + tl.abs(up_lse) + tl.abs(up_log_prob) + tl.abs(up_entropy)
    to = grad + row[:, None] * (grad_stride // GRAD_VECTOR * GRAD_VECTOR) + columns[None, :]
    written = here[:, None] & (columns < V // GRAD_VECTOR * GRAD_VECTOR)[None, :]
    flag = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    if tl.max((asked != 0).to(tl.int32), 0) == 0:  # rows that are ignored or have no weight
        tl.store(to, tl.zeros((ROWS, COLUMNS), grad.dtype.element_ty), mask=written)
        if kept is not None:
            tl.store(kept + flag, 0)
        return
    eps, k, cap, scale = number(label_smoothing, F), number(z_loss, F), number(softcap, F), number(logit_scale, F)
    centre, log_sum, log_p = tl.load(stats + i), tl.load(stats + N + i), tl.load(stats + 2 * N + i)
    w_y, mean = at(weight, y, 1.0, F) + tl.zeros_like(centre), tl.zeros_like(centre)
    mass, classes, H = w_y, V.to(F), H // VECTOR * VECTOR
    if GENERAL:
        mass, mean = tl.load(stats + 3 * N + i), tl.load(stats + 4 * N + i)
    A, E, B, C = coefficients(
        mass, centre + log_sum, log_sum, mean, w_y, eps, k, classes,
        up * scale, up_lse * scale, up_log_prob * scale, up_entropy * scale, False,
    )  # fmt: skip
    hidden += row[:, None] * (hidden_stride // VECTOR * VECTOR)
    across = head + columns[None, :].to(tl.int64) * (head_stride // VECTOR * VECTOR)
    z = product(hidden, across, bias, here, columns, V, H, cap, scale, F, GENERAL, ROWS, COLUMNS, DEPTH)
    y = tl.where(ignored, -1, y)
    dx = gradient(
        z, columns, y, V, weight, classes, eps, centre, log_sum, log_p, A, E, B, C, cap, scale, F, GENERAL
    )  # fmt: skip
    dx = tl.where((asked != 0)[:, None] & (columns < V)[None, :], dx, 0.0)
    if kept is not None:
        small = (tl.abs(dx) < (number(filter_eps, F) * asked)[:, None]) | (dx == 0)  # of NaN, neither
        some = tl.max(tl.max(1 - small.to(tl.int32), 1), 0)
        tl.store(kept + flag, some)
        dx = tl.where(some != 0, dx, 0.0)
    tl.store(to, dx, mask=written)


@tuned(
    [
        shape(8, 3, COLUMNS=128, DEPTH=64),
        shape(8, 4, COLUMNS=128, DEPTH=32),
        shape(8, 4, COLUMNS=128, DEPTH=64),
        shape(4, 4, COLUMNS=64, DEPTH=64),
    ],
    ["H", "size", "TRANSPOSED", "ROWS", "TILE", "VECTOR", "GRAD_VECTOR"],
    **restored("out", when="ADD"),
)
@kernel
def kept_product(
    grad, grad_stride: tl.int64, other, other_stride: tl.int64, tiles, counts, most, out, out_stride: tl.int64, M, K, H,
    size, TRANSPOSED: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    DEPTH: tl.constexpr, VECTOR: tl.constexpr, GRAD_VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid (H / COLUMNS, M / ROWS). out (M, H) = grad (M, K) @ other (K, H), or with ADD more by that, over each row of
    tiles' `counts` ones that are kept of TILE each, in the order of `tiles` (grid, most). TRANSPOSED: grad lies in
    memory as (K, M)."""
    F: tl.constexpr = out.dtype.element_ty
    STEPS: tl.constexpr = TILE // DEPTH
    line = tl.program_id(1)
    steps = tl.load(counts + line) * STEPS
    if ADD:  # noqa: SIM102 - one is known to the compiler, the other is not
        if steps == 0:
            return
    row, column = line * ROWS + tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    H = H // VECTOR * VECTOR
    if TRANSPOSED:
        M = M // GRAD_VECTOR * GRAD_VECTOR
    else:
        K = K // GRAD_VECTOR * GRAD_VECTOR
    grad_stride, other_stride = grad_stride // GRAD_VECTOR * GRAD_VECTOR, other_stride // VECTOR * VECTOR
    here, across = row < M, column < H
    z = tl.zeros((ROWS, COLUMNS), F)
    tiles += line * most
    tile = tl.load(tiles)
    for step in range(steps):
        k = tile * TILE + step % STEPS * DEPTH + tl.arange(0, DEPTH)
        # The next step's already: the loads of operands, which are issued ahead, wait for no other.
        tile = tl.load(tiles + tl.minimum((step + 1) // STEPS, most - 1))
        if TRANSPOSED:
            a = grad + k[None, :].to(tl.int64) * grad_stride + row[:, None]
        else:
            a = grad + row[:, None].to(tl.int64) * grad_stride + k[None, :]
        a = tl.load(a, mask=here[:, None] & (k < K)[None, :], other=0.0)
        b = other + k[:, None].to(tl.int64) * other_stride + column[None, :]
        z = tl.dot(a, tl.load(b, mask=(k < K)[:, None] & across[None, :], other=0.0), z)
    to = out + row[:, None].to(tl.int64) * (out_stride // VECTOR * VECTOR) + column[None, :]
    written = here[:, None] & across[None, :]
    if ADD:
        z += tl.load(to, mask=written, other=0.0)
    tl.store(to, z, mask=written)
