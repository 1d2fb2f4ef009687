"""The kernels over rows of logits beside rows of target logits (divergences). On chip: both read once, the gradient
written once. Longer rows: the states of their slices, for a mixture (JS) a second round that knows all sums, and the
gradient from both read again.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from .loss import divergence, divergence_coefficients, mixed, slope, unit_of
from .row_kernels import NOTHING, at, kernel, line, logits, number, weighted_upstream
from .state import LOG2E, merge_pairs

PAIR_STATE = tl.constexpr(5)  # centre, sum, target centre, target sum, tilt; of mixtures: divergence, mean


@triton.jit
def finite(top):
    """Nothing but -inf has no centre; its exponentials are zero about any."""
    return tl.where(top == NOTHING, 0.0, top)


@triton.jit
def target_logits(u, columns, V, F: tl.constexpr):
    return tl.load(u + columns, mask=columns < V, other=NOTHING).to(F)


@triton.jit
def pair_gradient(a, b, p, q, A, E, Q, beta, rest, FORWARD: tl.constexpr, REVERSE: tl.constexpr):
    """The gradient with respect to z; a and b are the exponents of p and q but for their sums."""
    if REVERSE:
        return tl.fma(E, tl.where(p > 0, a - b, 0.0), A) * p
    elif FORWARD:  # noqa: RET505 - Triton compiles one of them
        return tl.fma(A, p, -Q * q)
    else:
        _, h = mixed(p, q, beta, rest)
        return tl.fma(A, p, -Q * h)


@kernel
def pair_loss_grad(
    x, x_stride: tl.int64, x_group, x_outer: tl.int64,
    target, target_stride: tl.int64, target_group, target_outer: tl.int64, V,
    z_loss: tl.float64, softcap: tl.float64, logit_scale: tl.float64, target_scale: tl.float64, beta: tl.float64,
    g, g_stride: tl.int64, upstream: tl.float64, token_weight, token_stride: tl.int64, denominator, unless_one,
    loss, grad, grad_stride: tl.int64, grad_group, grad_outer: tl.int64,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid (N,). The loss and the gradient of a row that stays, with its target, in registers."""
    F: tl.constexpr = loss.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns, V = tl.arange(0, BLOCK), V // VECTOR * VECTOR
    x += line(row, x_stride, x_group, x_outer, VECTOR)
    target += line(row, target_stride, target_group, target_outer, VECTOR)
    grad += line(row, grad_stride, grad_group, grad_outer, VECTOR)
    up, done = weighted_upstream(
        g, row * g_stride, upstream, token_weight, row * token_stride, denominator, unless_one, F
    )
    if done:
        return
    k, cap, scale = number(z_loss, F), number(softcap, F), number(logit_scale, F)
    unit, target_unit = unit_of(cap, scale), number(target_scale, F)
    beta, rest = number(beta, F), number(1 - beta, F)
    z, u = logits(x, columns, V, cap, scale, F, True), target_logits(target, columns, V, F)
    top, target_top = finite(tl.max(z, 0)), finite(tl.max(u, 0))
    a, b = (z - top) * unit, (u - target_top) * target_unit
    p, q = tl.exp2(a * LOG2E), tl.exp2(b * LOG2E)
    s, t = tl.sum(p, 0), tl.sum(q, 0)
    log_sum, target_log_sum = tl.log(s), tl.log(t)
    tilt, mixture = number(0.0, F), number(0.0, F)
    if FORWARD:
        tilt = tl.sum(tl.where(q > 0, q * (b - a), 0.0), 0) / t
    p, q = p / s, q / t
    if REVERSE:
        r = tl.where(p > 0, a - b, 0.0)
        tilt = tl.sum(p * r, 0)
        tilt += tl.sum(p * (r - tilt), 0)  # every entry of the gradient is its r less this mean
    if not FORWARD and not REVERSE:
        entries, h = mixed(p, q, beta, rest)
        mixture, tilt = tl.sum(entries, 0), tl.sum(h, 0)
    lse = top * unit + log_sum
    tl.store(loss + row, divergence(log_sum, target_log_sum, tilt, mixture, lse, k, FORWARD, REVERSE))
    A, E, Q = divergence_coefficients(tilt, lse, k, rest, up * scale, 0.0, FORWARD, REVERSE)
    dx = slope(pair_gradient(a, b, p, q, A, E, Q, beta, rest, FORWARD, REVERSE), z, cap)
    tl.store(grad + columns, tl.where(up == 0, 0.0, dx), mask=columns < V)


@kernel
def pair_states(
    x, x_stride: tl.int64, x_group, x_outer: tl.int64,
    target, target_stride: tl.int64, target_group, target_outer: tl.int64, V,
    softcap: tl.float64, logit_scale: tl.float64, target_scale: tl.float64, states, slices,
    FORWARD: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid (N, slices). The state of one slice of a row and of its target's, in states (N, slices, PAIR_STATE)."""
    F: tl.constexpr = states.dtype.element_ty
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    columns, V = tl.arange(0, BLOCK), V // VECTOR * VECTOR - start
    cap, scale = number(softcap, F), number(logit_scale, F)
    states += (row * slices + tl.program_id(1)) * PAIR_STATE
    x += line(row, x_stride, x_group, x_outer, VECTOR) + start
    target += line(row, target_stride, target_group, target_outer, VECTOR) + start
    z, u = logits(x, columns, V, cap, scale, F, True), target_logits(target, columns, V, F)
    top, target_top = tl.max(z, 0), tl.max(u, 0)
    a, b = (z - finite(top)) * unit_of(cap, scale), (u - finite(target_top)) * number(target_scale, F)
    e, f = tl.exp2(a * LOG2E), tl.exp2(b * LOG2E)
    tilt = tl.where(f > 0, f * (b - a), 0.0) if FORWARD else tl.where(e > 0, e * (a - b), 0.0)
    tl.store(states, top)
    tl.store(states + 1, tl.sum(e, 0))
    tl.store(states + 2, target_top)
    tl.store(states + 3, tl.sum(f, 0))
    tl.store(states + 4, tl.sum(tilt, 0))


@kernel
def pair_finish(
    N: tl.int64, z_loss: tl.float64, softcap: tl.float64, logit_scale: tl.float64, target_scale: tl.float64,
    states, slices, loss, stats,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Grid (N / ROWS,). Merges each row's slices, and writes its statistics and, but of a mixture, its loss."""
    F: tl.constexpr = loss.dtype.element_ty
    row, slice = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, SLICES)[None, :]
    states += (row[:, None] * slices + slice) * PAIR_STATE
    here, there = row < N, (row < N)[:, None] & (slice < slices)
    k, cap, scale = number(z_loss, F), number(softcap, F), number(logit_scale, F)
    unit, target_unit = unit_of(cap, scale), number(target_scale, F)
    top, s, target_top, t, tilt = merge_pairs(
        tl.load(states, mask=there, other=NOTHING), tl.load(states + 1, mask=there, other=0.0),
        tl.load(states + 2, mask=there, other=NOTHING), tl.load(states + 3, mask=there, other=0.0),
        tl.load(states + 4, mask=there, other=0.0), unit, target_unit, FORWARD, 1,
    )  # fmt: skip
    log_sum, target_log_sum = tl.log(s), tl.log(t)
    tilt = tilt / t if FORWARD else tilt / s
    centre, target_centre = top * unit, target_top * target_unit
    value = divergence(log_sum, target_log_sum, tilt, tilt, centre + log_sum, k, FORWARD, REVERSE)
    # What rounding takes from a centre, its log-sum keeps.
    lost = tl.fma(top, unit + tl.zeros_like(top), -centre)
    target_lost = tl.fma(target_top, target_unit + tl.zeros_like(top), -target_centre)
    tl.store(loss + row, value, mask=here)
    tl.store(stats + row, centre, mask=here)
    tl.store(stats + N + row, log_sum + tl.where(lost == lost, lost, 0.0), mask=here)
    tl.store(stats + 2 * N + row, target_centre, mask=here)
    tl.store(stats + 3 * N + row, target_log_sum + tl.where(target_lost == target_lost, target_lost, 0.0), mask=here)
    tl.store(stats + 4 * N + row, tilt, mask=here)


@triton.jit
def probabilities(z, unit, stats, i, N):
    """(exponents, probabilities) about a row's centre and log-sum, which stand at stats[i] and stats[i + N]."""
    a = tl.fma(z, unit, -finite(tl.load(stats + i)))
    return a, tl.exp2(tl.fma(a, number(LOG2E, a.dtype), -tl.load(stats + i + N) * LOG2E))


@kernel
def pair_mixtures(
    x, x_stride: tl.int64, x_group, x_outer: tl.int64,
    target, target_stride: tl.int64, target_group, target_outer: tl.int64, V, N: tl.int64,
    softcap: tl.float64, logit_scale: tl.float64, target_scale: tl.float64, beta: tl.float64, stats, states, slices,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid (N, slices). What one slice contributes to its row's mixture."""
    F: tl.constexpr = stats.dtype.element_ty
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    columns, V = tl.arange(0, BLOCK), V // VECTOR * VECTOR - start
    cap, scale, beta, rest = number(softcap, F), number(logit_scale, F), number(beta, F), number(1 - beta, F)
    states += (row * slices + tl.program_id(1)) * PAIR_STATE
    z = logits(x + line(row, x_stride, x_group, x_outer, VECTOR) + start, columns, V, cap, scale, F, True)
    u = target_logits(target + line(row, target_stride, target_group, target_outer, VECTOR) + start, columns, V, F)
    _, p = probabilities(z, unit_of(cap, scale), stats, row, N)
    _, q = probabilities(u, number(target_scale, F), stats, 2 * N + row, N)
    entries, h = mixed(p, q, beta, rest)
    tl.store(states, tl.sum(entries, 0))
    tl.store(states + 1, tl.sum(h, 0))


@kernel
def pair_mixed(
    N: tl.int64, z_loss: tl.float64, states, slices, loss, stats,
    ROWS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Grid (N / ROWS,). Adds up each row's mixtures, and writes its loss and what its gradient needs of them."""
    F: tl.constexpr = loss.dtype.element_ty
    row, slice = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, SLICES)[None, :]
    states += (row[:, None] * slices + slice) * PAIR_STATE
    here, there = row < N, (row < N)[:, None] & (slice < slices)
    mixture = tl.sum(tl.load(states, mask=there, other=0.0), 1)
    tilt = tl.sum(tl.load(states + 1, mask=there, other=0.0), 1)
    lse = tl.load(stats + row, mask=here, other=0.0) + tl.load(stats + N + row, mask=here, other=0.0)
    value = divergence(lse, lse, lse, mixture, lse, number(z_loss, F), False, False)
    tl.store(loss + row, value, mask=here)
    tl.store(stats + 4 * N + row, tilt, mask=here)


@kernel
def pair_grad(
    x, x_stride: tl.int64, x_group, x_outer: tl.int64,
    target, target_stride: tl.int64, target_group, target_outer: tl.int64, V, N: tl.int64,
    z_loss: tl.float64, softcap: tl.float64, logit_scale: tl.float64, target_scale: tl.float64, beta: tl.float64,
    g, g_stride: tl.int64, upstream: tl.float64, token_weight, token_stride: tl.int64, denominator, unless_one,
    lse, lse_stride: tl.int64, stats, grad, grad_stride: tl.int64, grad_group, grad_outer: tl.int64,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid (N, parts). The gradient of PART columns of a row, from its statistics."""
    F: tl.constexpr = stats.dtype.element_ty
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * PART
    up, done = weighted_upstream(
        g, row * g_stride, upstream, token_weight, row * token_stride, denominator, unless_one, F
    )
    if done:
        return
    up_lse = at(lse, row * lse_stride, 0.0, F)
    columns, V = tl.arange(0, BLOCK), V // VECTOR * VECTOR
    x += line(row, x_stride, x_group, x_outer, VECTOR)
    target += line(row, target_stride, target_group, target_outer, VECTOR)
    grad += line(row, grad_stride, grad_group, grad_outer, VECTOR)
    k, cap, scale = number(z_loss, F), number(softcap, F), number(logit_scale, F)
    unit, target_unit = unit_of(cap, scale), number(target_scale, F)
    beta, rest = number(beta, F), number(1 - beta, F)
    lse_of_row = tl.load(stats + row) + tl.load(stats + N + row)
    A, E, Q = divergence_coefficients(
        tl.load(stats + 4 * N + row), lse_of_row, k, rest, up * scale, up_lse * scale, FORWARD, REVERSE
    )
    nothing = (up == 0) & (up_lse == 0)
    for start in range(first, tl.minimum(first + PART, V), BLOCK):
        z = logits(x + start, columns, V - start, cap, scale, F, True)
        u = target_logits(target + start, columns, V - start, F)
        a, p = probabilities(z, unit, stats, row, N)
        b, q = probabilities(u, target_unit, stats, 2 * N + row, N)
        dx = slope(pair_gradient(a, b, p, q, A, E, Q, beta, rest, FORWARD, REVERSE), z, cap)
        tl.store(grad + start + columns, tl.where(nothing, 0.0, dx), mask=columns < V - start)
