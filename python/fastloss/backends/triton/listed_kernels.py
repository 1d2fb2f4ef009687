"""The kernels whose targets list classes (top-k), the others being ignored or one class more, the TAIL; states of
slices are row_kernels.row_states'."""
# mypy: ignore-errors

import triton
import triton.language as tl

from .loss import ROUNDING, epilogue, slope, squashed, times, unit_of
from .row_kernels import NOTHING, STATE, at, hidden, kernel, line, logits, number, spread, weighted_upstream, weights
from .state import LOG2E, exp, merge


@triton.jit
def listed_classes(target, probs, weight, picks, V, ignore_index, F: tl.constexpr, PICKS: tl.constexpr):
    """(columns, shares, class weights, which of them count): each class that a row lists, once."""
    k = tl.arange(0, PICKS)
    y = tl.load(target + k, mask=k < picks, other=ignore_index)
    given, inside = y != ignore_index, (y >= 0) & (y < V)
    tl.device_assert(inside | (given == 0), "fastloss: target out of range")
    share, first = tl.zeros((PICKS,), F), k < picks
    for i in range(picks):
        same = y == tl.load(target + i)
        share += tl.where(same, tl.load(probs + i), 0.0)
        first &= (same == 0) | (k <= i)
    counts = first & given & inside
    y, w = tl.where(counts, y, 0), tl.full((PICKS,), 1.0, F)
    if weight is not None:
        w = tl.load(weight + y, mask=counts, other=0.0)
    return y, tl.where(counts, share * w, 0.0), w, counts


@triton.jit
def finalize_listed(
    s, top, all_top, all_sum, plain, weight_sum, r, share, eps, k, unit, classes, AXIS: tl.constexpr, TAIL: tl.constexpr
):
    """(loss, log_sum, lse, mass, log_prob, tail's log_prob) from a row's sums and its listed classes, r above the
    centre."""
    log_sum, listed_mass = tl.log(all_sum), tl.sum(share, AXIS)
    log_prob = tl.sum(times(share, r), AXIS) - times(listed_mass, log_sum)
    lse = all_top * unit + log_sum
    tail = tl.zeros_like(log_sum)
    if TAIL:
        tail = tl.where(s > 0, (top - all_top) * unit + (tl.log(s) - log_sum), NOTHING)
        tail = tl.where(tail > 0, 0.0, tail)
        rest = tl.where(listed_mass < 1, 1 - listed_mass, 0.0)
        rest = tl.where((rest < ROUNDING) & (tail == NOTHING), 0.0, rest)
        mass = listed_mass + rest
        loss = -log_prob - times(rest, tail)
    else:
        smooth = eps / classes
        mass = tl.fma(smooth, weight_sum, (1 - eps) * listed_mass)
        loss = -times(1 - eps + tl.zeros_like(log_sum), log_prob) - times(smooth, plain - times(weight_sum, log_sum))
    return loss + times(k, lse * lse), log_sum, lse, mass, log_prob, tail


@triton.jit
def listed_sums(s, top, z, counts, unit, AXIS: tl.constexpr, TAIL: tl.constexpr):
    """(largest of all, sum of all about it) from those of the row, or of the tail."""
    if TAIL:
        all_top = tl.maximum(top, tl.max(z, AXIS))
        others = tl.where(s > 0, s * exp((top - all_top) * unit), 0.0)
        listed = tl.where(counts, tl.exp2((z - all_top) * (unit * LOG2E)), 0.0)
        return all_top, others + tl.sum(listed, AXIS)
    else:  # noqa: RET505 - Triton compiles one of the two
        return top, s


@kernel
def listed_loss_grad(
    x, x_stride: tl.int64, x_group, x_outer: tl.int64, target, probs, picks, weight, V,
    ignore_index: tl.int64, label_smoothing: tl.float64, z_loss: tl.float64, softcap: tl.float64,
    logit_scale: tl.float64,
    g, g_stride: tl.int64, upstream: tl.float64, token_weight, token_stride: tl.int64, denominator, unless_one,
    loss, grad, grad_stride: tl.int64, grad_group, grad_outer: tl.int64,
    GENERAL: tl.constexpr, TAIL: tl.constexpr, PICKS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid (N,). The loss and the gradient of a row that stays in registers."""
    F: tl.constexpr = loss.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns, V, classes = tl.arange(0, BLOCK), V // VECTOR * VECTOR, V.to(F)
    x += line(row, x_stride, x_group, x_outer, VECTOR)
    grad += line(row, grad_stride, grad_group, grad_outer, VECTOR)
    target, probs = target + row * picks, probs + row * picks
    up, done = weighted_upstream(
        g, row * g_stride, upstream, token_weight, row * token_stride, denominator, unless_one, F
    )
    if done:
        return
    y, share, w_y, counts = listed_classes(target, probs, weight, picks, V, ignore_index, F, PICKS)
    if (tl.sum(counts.to(tl.int32), 0) == 0) | (up == 0):
        tl.store(grad + columns, tl.zeros((BLOCK,), F), mask=columns < V)
        tl.store(loss + row, 0.0)
        return
    eps, k, cap, scale = number(label_smoothing, F), number(z_loss, F), number(softcap, F), number(logit_scale, F)
    unit, plain, weight_sum = unit_of(cap, scale), number(0.0, F), number(0.0, F)
    z_y = tl.load(x + y, mask=counts, other=0.0).to(F)
    z = logits(x, columns, V, cap, scale, F, GENERAL)
    if GENERAL:
        z_y = squashed(z_y, cap, scale)
    z_y = tl.where(counts, z_y, NOTHING)
    if TAIL:
        z = hidden(z, columns, target, picks, ignore_index)
    top = tl.max(z, 0)
    centre = tl.where(top == NOTHING, 0.0, top)
    e = tl.exp2((z - centre) * (unit * LOG2E))
    s = tl.sum(e, 0)
    if GENERAL:
        w = weights(weight, None, columns, V, classes, eps, F)
        plain, weight_sum = tl.sum(times(w, (z - top) * unit), 0), tl.sum(w, 0)
    all_top, all_sum = listed_sums(s, top, z_y, counts, unit, 0, TAIL)
    r = (z_y - all_top) * unit
    value, log_sum, lse, mass, _, tail = finalize_listed(
        s, top, all_top, all_sum, plain, weight_sum, r, share, eps, k, unit, classes, 0, TAIL
    )
    tl.store(loss + row, value)
    up = up * scale
    A_y = up * tl.fma(2 * k, lse, mass)
    if TAIL:
        rest = tl.where(tl.sum(share, 0) < 1, 1 - tl.sum(share, 0), 0.0)
        A, B, C = tl.where(s > 0, (A_y * exp(tail) - up * rest) / s, 0.0), up, 0.0 * up
    else:
        A, B, C = A_y / s, up * (1 - eps), times(eps / classes, up)
    dx = A * e
    if GENERAL:
        dx = slope(dx - C * w, z, cap)
    tl.store(grad + columns, dx, mask=columns < V)
    dy = A_y * tl.exp2((r - log_sum) * LOG2E) - B * share
    if GENERAL:
        dy = slope(dy - C * w_y, z_y, cap)
    tl.debug_barrier()  # the listed classes' own entries, over what other threads wrote there
    tl.store(grad + y, dy, mask=counts)


@kernel
def listed_finish(
    x, x_stride: tl.int64, x_group, x_outer: tl.int64, target, probs, picks, weight, V, N: tl.int64,
    ignore_index: tl.int64, label_smoothing: tl.float64, z_loss: tl.float64, softcap: tl.float64,
    logit_scale: tl.float64,
    states, slices, loss, stats, argmax,
    GENERAL: tl.constexpr, EXTRAS: tl.constexpr, TAIL: tl.constexpr, PICKS: tl.constexpr, BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    """Grid (N,). Merges a row's slices of length BLOCK, and writes its loss and statistics. Of a tail these are its
    centre, log-sum and log-probability, and the log-sum and centre of all."""
    F: tl.constexpr = loss.dtype.element_ty
    row, slice = tl.program_id(0).to(tl.int64), tl.arange(0, SLICES)[None, :]
    here, there = row + tl.arange(0, 1), slice < slices
    states += (row * slices + slice) * STATE
    eps, k, cap, scale = number(label_smoothing, F), number(z_loss, F), number(softcap, F), number(logit_scale, F)
    unit, classes = unit_of(cap, scale), V.to(F)
    centres, s = tl.load(states, mask=there, other=NOTHING), tl.load(states + 1, mask=there, other=0.0)
    moment, plain, weight_sum = tl.zeros_like(s), tl.zeros_like(s), tl.zeros_like(s)
    if EXTRAS:
        moment = tl.load(states + 2, mask=there, other=0.0)
    if GENERAL:
        plain, weight_sum = tl.load(states + 3, mask=there, other=0.0), tl.load(states + 4, mask=there, other=0.0)
    top, s, moment, plain, weight_sum = merge(centres, s, moment, plain, weight_sum, unit, 1)
    y, share, _, counts = listed_classes(
        target + row * picks, probs + row * picks, weight, picks, V, ignore_index, F, PICKS
    )
    z_y = tl.load(x + line(row, x_stride, x_group, x_outer, 1) + y, mask=counts, other=0.0).to(F)
    if GENERAL:
        z_y = squashed(z_y, cap, scale)
    z_y, share, counts = tl.where(counts, z_y, NOTHING)[None, :], share[None, :], counts[None, :]
    all_top, all_sum = listed_sums(s, top, z_y, counts, unit, 1, TAIL)
    value, log_sum, _, mass, log_prob, tail = finalize_listed(
        s, top, all_top, all_sum, plain, weight_sum, (z_y - all_top[:, None]) * unit, share,
        eps, k, unit, classes, 1, TAIL,
    )  # fmt: skip
    ignored = tl.sum(counts.to(tl.int32), 1) == 0
    centre, entropy = all_top * unit, log_sum - moment / s
    lost = tl.fma(all_top, unit + tl.zeros_like(all_top), -centre)  # what rounding takes from a centre, its log keeps
    log_sum += tl.where(lost == lost, lost, 0.0)
    if TAIL:
        entropy, mass, log_prob = centre, log_sum, tail
        centre = tl.where(s > 0, top * unit, 0.0)
        lost = tl.fma(top, unit + tl.zeros_like(top), -centre)
        log_sum = tl.where(s > 0, tl.log(s) + tl.where(lost == lost, lost, 0.0), 0.0)
    if EXTRAS:
        column = tl.load(states + 5, mask=there, other=0.0).to(tl.int64) + slice * BLOCK
        largest = tl.min(tl.where(centres == top[:, None], column, V - 1), 1)
        tl.store(argmax + here, tl.where(ignored, 0, largest))
    tl.store(loss + here, tl.where(ignored, 0.0, value))
    tl.store(stats + here, tl.where(ignored, 0.0, centre))
    tl.store(stats + N + here, tl.where(ignored, 0.0, log_sum))
    tl.store(stats + 2 * N + here, tl.where(ignored, 0.0, log_prob))
    tl.store(stats + 3 * N + here, tl.where(ignored, 0.0, mass))
    tl.store(stats + 4 * N + here, tl.where(ignored, 0.0, entropy))


@kernel
def listed_grad(
    x, x_stride: tl.int64, x_group, x_outer: tl.int64, target, probs, picks, weight, V, N: tl.int64,
    ignore_index: tl.int64, label_smoothing: tl.float64, z_loss: tl.float64, softcap: tl.float64,
    logit_scale: tl.float64,
    g, g_stride: tl.int64, upstream: tl.float64, token_weight, token_stride: tl.int64, denominator, unless_one,
    lse, lse_stride: tl.int64, entropy, entropy_stride: tl.int64,
    stats, grad, grad_stride: tl.int64, grad_group, grad_outer: tl.int64,
    GENERAL: tl.constexpr, TAIL: tl.constexpr, PICKS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid (N, parts). The gradient of PART columns of a row, from its statistics."""
    F: tl.constexpr = stats.dtype.element_ty
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * PART
    up, done = weighted_upstream(
        g, row * g_stride, upstream, token_weight, row * token_stride, denominator, unless_one, F
    )
    if done:
        return
    up_lse, up_entropy = at(lse, row * lse_stride, 0.0, F), at(entropy, row * entropy_stride, 0.0, F)
    columns, V, classes = tl.arange(0, BLOCK), V // VECTOR * VECTOR, V.to(F)
    last = tl.minimum(first + PART, V)
    x += line(row, x_stride, x_group, x_outer, VECTOR)
    grad += line(row, grad_stride, grad_group, grad_outer, VECTOR)
    y, share, w_y, counts = listed_classes(
        target + row * picks, probs + row * picks, weight, picks, V, ignore_index, F, PICKS
    )
    ignored = tl.sum(counts.to(tl.int32), 0) == 0
    up, up_lse = tl.where(ignored, 0.0, up), tl.where(ignored, 0.0, up_lse)
    up_entropy = tl.where(ignored, 0.0, up_entropy)
    if (up == 0) & (up_lse == 0) & (up_entropy == 0):
        for start in range(first, last, BLOCK):
            tl.store(grad + start + columns, tl.zeros((BLOCK,), F), mask=columns < V - start)
        return
    eps, k, cap, scale = number(label_smoothing, F), number(z_loss, F), number(softcap, F), number(logit_scale, F)
    centre, log_sum = tl.load(stats + row), tl.load(stats + N + row)
    mass, H = tl.load(stats + 3 * N + row), tl.load(stats + 4 * N + row)
    mine = counts & (y >= first) & (y < last)  # others may have been overwritten
    z_y = tl.load(x + y, mask=mine, other=0.0).to(F)
    if GENERAL:
        z_y = squashed(z_y, cap, scale)
    tl.debug_barrier()  # before the gradient overwrites them
    up, up_lse, up_entropy = up * scale, up_lse * scale, up_entropy * scale
    if TAIL:
        all_centre, all_log_sum, listed_mass = H, mass, tl.sum(share, 0)
        rest = tl.where(listed_mass < 1, 1 - listed_mass, 0.0)
        A_y = up * tl.fma(2 * k, all_centre + all_log_sum, listed_mass + rest)
        A, E = A_y * exp(tl.load(stats + 2 * N + row)) - up * rest, 0.0 * up
        B, C = up, 0.0 * up
    else:
        all_centre, all_log_sum = centre, log_sum
        A_y = up * tl.fma(2 * k, centre + log_sum, mass) + up_lse + times(up_entropy, log_sum - H)
        A, E = A_y, -up_entropy
        B, C = up * (1 - eps), times(eps / classes, up)
    spread(x, grad, first, last, V, weight, None, classes, eps, centre, log_sum, A, E, C, cap, scale, F, GENERAL, BLOCK)
    r = tl.fma(z_y, unit_of(cap, scale) + tl.zeros_like(z_y), -all_centre)
    p = tl.exp2((r - all_log_sum) * LOG2E)
    dy = epilogue(A_y, E, C, p, r, w_y) - B * share
    if GENERAL:
        dy = slope(dy, z_y, cap)
    tl.debug_barrier()  # over what other threads wrote there
    tl.store(grad + y, dy, mask=mine)
