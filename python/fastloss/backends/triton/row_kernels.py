"""The kernels over logits. A row on chip: read once, its gradient written once. A longer row: the states of its slices,
merged in one order, and the gradient from the logits read again.

Numbers are arguments of fixed types: nothing is compiled again because one changes. VECTOR divides V and all strides,
which Triton would otherwise have to be told by the values themselves: as many elements are accessed at once.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from .loss import coefficients, epilogue, finalize, number, slope, smoothed, squashed, times, unit_of
from .state import LOG2E, merge

NOTHING = tl.constexpr(float("-inf"))  # a logit that is not there
# centre, sum, moment, plain, mass; the maximum's column in its slice; logits above the target's, or where there is no
# row to read it from the target's logit
STATE = tl.constexpr(7)

_NUMBERS = (
    "V",
    "N",
    "H",
    "M",
    "K",
    "most",
    "size",
    "hidden_stride",
    "head_stride",
    "other_stride",
    "out_stride",
    "picks",
    "unless_one",
    "ignore_index",
    "x_stride",
    "x_group",
    "x_outer",
    "target_stride",
    "target_group",
    "target_outer",
    "grad_stride",
    "grad_group",
    "grad_outer",
    "token_stride",
)
_NUMBERS += ("g_stride", "lse_stride", "log_prob_stride", "entropy_stride")


def kernel(fn):
    """A Triton kernel of which one binary serves all numbers."""
    names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    return triton.jit(fn, do_not_specialize=[name for name in names if name in _NUMBERS])


@triton.jit
def line(row, stride, group, outer, VECTOR: tl.constexpr):
    """Where a row begins: rows at one stride or, with a group of so many, groups at another, `outer`."""
    if group is None:
        return row * (stride // VECTOR * VECTOR)
    else:  # noqa: RET505 - Triton compiles one of the two
        g = row.to(tl.int32) // group  # a launch has no more rows, and a division of 64 bits takes many instructions
        near = (row - g * group) * (stride // VECTOR * VECTOR)
        return near + g * (outer // VECTOR * VECTOR)


@triton.jit
def at(vector, i, otherwise, F: tl.constexpr):
    """vector[i], or `otherwise` where there is none."""
    if vector is None:
        return number(otherwise, F)
    else:  # noqa: RET505 - Triton compiles one of the two
        return tl.load(vector + i)


@triton.jit
def logits(x, columns, V, softcap, logit_scale, F: tl.constexpr, GENERAL: tl.constexpr):
    """Logits as `squashed`; nothing past the last column."""
    z = tl.load(x + columns, mask=columns < V, other=NOTHING).to(F)
    if GENERAL:
        z = tl.where(columns < V, squashed(z, softcap, logit_scale), NOTHING)
    return z


@triton.jit
def weights(weight, probs, columns, V, classes, label_smoothing, F: tl.constexpr):
    """Class weights, or with class probabilities q'; zero past the last column."""
    inside = columns < V
    w = tl.where(inside, 1.0, 0.0).to(F)
    if weight is not None:
        w = tl.load(weight + columns, mask=inside, other=0.0)
    if probs is not None:
        q = tl.load(probs + columns, mask=inside, other=0.0).to(F)
        w = tl.where(inside, smoothed(q, w, label_smoothing, classes), 0.0)
    return w


@triton.jit
def label(y, V, ignore_index):
    """(class index, whether the row is ignored). No index reaches beyond its row, whether or not it is asserted."""
    ignored = y == ignore_index
    inside = (y >= 0) & (y < V)
    tl.device_assert(inside | ignored, "fastloss: target out of range")
    return tl.where(inside, y, 0), ignored


@triton.jit
def hidden(z, columns, listed, picks, ignore_index):
    """Logits without the classes that a target lists."""
    for k in range(picks):
        y = tl.load(listed + k)
        z = tl.where((columns == y) & (y != ignore_index), NOTHING, z)
    return z


@triton.jit
def weighted_upstream(g, i, upstream, token_weight, j, denominator, unless_one, F: tl.constexpr):
    """(the upstream gradient of a row's loss, whether it asks for nothing)."""
    up = at(g, i, upstream, F)
    done = (up == 1) & (unless_one != 0)
    up *= at(token_weight, j, 1.0, F)
    up /= at(denominator, 0, 1.0, F)
    return up, done


@kernel
def row_loss_grad(
    x, x_stride: tl.int64, x_group, x_outer: tl.int64,
    target, target_stride: tl.int64, target_group, target_outer: tl.int64, weight, V,
    ignore_index: tl.int64, label_smoothing: tl.float64, z_loss: tl.float64, softcap: tl.float64,
    logit_scale: tl.float64,
    g, g_stride: tl.int64, upstream: tl.float64, token_weight, token_stride: tl.int64, denominator, unless_one,
    loss, grad, grad_stride: tl.int64, grad_group, grad_outer: tl.int64,
    GENERAL: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid (N,). The loss and the gradient of a row that stays in registers."""
    F: tl.constexpr = loss.dtype.element_ty
    SOFT: tl.constexpr = target.dtype.element_ty.is_floating()
    row = tl.program_id(0).to(tl.int64)
    columns, V, classes = tl.arange(0, BLOCK), V // VECTOR * VECTOR, V.to(F)
    x += line(row, x_stride, x_group, x_outer, VECTOR)
    grad += line(row, grad_stride, grad_group, grad_outer, VECTOR)
    up, done = weighted_upstream(
        g, row * g_stride, upstream, token_weight, row * token_stride, denominator, unless_one, F
    )
    if done:
        return
    probs, w_y, y = None, number(1.0, F), 0
    if SOFT:
        probs = target + line(row, target_stride, target_group, target_outer, VECTOR)
    else:
        y, ignored = label(tl.load(target + row), V, ignore_index)
        up = tl.where(ignored, 0.0, up)
        w_y = at(weight, y, 1.0, F)
    if up == 0:  # a row that is ignored or has no weight: whatever it holds does not count
        tl.store(grad + columns, tl.zeros((BLOCK,), F), mask=columns < V)
        tl.store(loss + row, 0.0)
        return
    eps, k, cap, scale = number(label_smoothing, F), number(z_loss, F), number(softcap, F), number(logit_scale, F)
    unit, plain, mass = scale, number(0.0, F), number(0.0, F)

    z_y = tl.load(x + y).to(F)
    z = logits(x, columns, V, cap, scale, F, GENERAL)
    top = tl.max(z, 0)
    if GENERAL:
        unit, z_y = unit_of(cap, scale), squashed(z_y, cap, scale)
        w = weights(weight, probs, columns, V, classes, eps, F)
        plain, mass = tl.sum(times(w, (z - top) * unit), 0), tl.sum(w, 0)
    else:
        eps = number(0.0, F)
    e = tl.exp2((z - top) * (unit * LOG2E))
    s = tl.sum(e, 0)
    r_y, log_sum = (z_y - top) * unit, tl.log(s)
    lse = top * unit + log_sum
    value, _, mass, _ = finalize(s, 0.0, plain, mass, lse, log_sum, r_y, w_y, eps, k, classes, SOFT)
    tl.store(loss + row, value)
    A, _, B, C = coefficients(mass, lse, log_sum, 0.0, w_y, eps, k, classes, up * scale, 0.0, 0.0, 0.0, SOFT)
    A /= s
    dx = A * e
    if GENERAL:
        dx = slope(dx - C * w, z, cap)
    tl.store(grad + columns, dx, mask=columns < V)
    if not SOFT:
        dx = A * tl.exp2(r_y * LOG2E) - B
        if GENERAL:
            dx = slope(dx - C * w_y, z_y, cap)
        tl.debug_barrier()  # the target's own entry, over what another thread wrote there
        tl.store(grad + y, dx)


@kernel
def row_states(
    x, x_stride: tl.int64, x_group, x_outer: tl.int64,
    target, target_stride: tl.int64, target_group, target_outer: tl.int64, weight, V,
    ignore_index: tl.int64, label_smoothing: tl.float64, softcap: tl.float64, logit_scale: tl.float64, states, slices,
    picks, GENERAL: tl.constexpr, EXTRAS: tl.constexpr, LISTED: tl.constexpr, TAIL: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid (N, slices). The state of one slice of a row, in states (N, slices, STATE). With LISTED targets (N, picks);
    TAIL: of the classes that they do not list."""
    F: tl.constexpr = states.dtype.element_ty
    SOFT: tl.constexpr = target.dtype.element_ty.is_floating()
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    if not SOFT and not LISTED:  # noqa: SIM102 - one is known to the compiler, the other is not
        if tl.load(target + row) == ignore_index:
            return
    columns, classes, all_columns = tl.arange(0, BLOCK), V.to(F), V
    V = V // VECTOR * VECTOR - start
    cap, scale = number(softcap, F), number(logit_scale, F)
    states += (row * slices + tl.program_id(1)) * STATE
    x += line(row, x_stride, x_group, x_outer, VECTOR) + start

    z = logits(x, columns, V, cap, scale, F, GENERAL)
    if TAIL:
        z = hidden(z, columns + start, target + row * picks, picks, ignore_index)
    top, unit = tl.max(z, 0), scale
    if GENERAL:
        unit = unit_of(cap, scale)
    r = z - tl.where(top == NOTHING, 0.0, top)
    e = tl.exp2(r * (unit * LOG2E))
    tl.store(states, top)
    tl.store(states + 1, tl.sum(e, 0))
    if EXTRAS:
        tl.store(states + 2, tl.sum(times(e, r), 0) * unit)
        tl.store(states + 5, tl.min(tl.where(z == top, columns, BLOCK), 0).to(F))
        if not SOFT and not LISTED:
            y, _ = label(tl.load(target + row), all_columns, ignore_index)
            raw = tl.load(x + columns, mask=columns < V, other=NOTHING).to(F)
            above = tl.sum((raw > tl.load(x - start + y).to(F)).to(tl.int32), 0)
            tl.store(states + 6, above.to(F))
    if GENERAL:
        probs = None
        if SOFT:
            probs = target + line(row, target_stride, target_group, target_outer, VECTOR) + start
        if weight is not None:
            weight += start
        w = weights(weight, probs, columns, V, classes, number(label_smoothing, F), F)
        tl.store(states + 3, tl.sum(times(w, r * unit), 0))
        tl.store(states + 4, tl.sum(w, 0))


@kernel
def row_finish(
    x, x_stride: tl.int64, x_group, x_outer: tl.int64, target, weight, V, N: tl.int64,
    ignore_index: tl.int64, label_smoothing: tl.float64, z_loss: tl.float64, softcap: tl.float64,
    logit_scale: tl.float64,
    states, slices, loss, stats, argmax, rank,
    GENERAL: tl.constexpr, EXTRAS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Grid (N / ROWS,). Merges each row's slices of length BLOCK, and writes its loss and statistics. Without `x`
    the target's logit comes with its slice."""
    F: tl.constexpr = loss.dtype.element_ty
    SOFT: tl.constexpr = target.dtype.element_ty.is_floating()
    row, slice = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, SLICES)[None, :]
    states += (row[:, None] * slices + slice) * STATE
    here, there = row < N, (row < N)[:, None] & (slice < slices)
    eps, k, cap, scale = number(label_smoothing, F), number(z_loss, F), number(softcap, F), number(logit_scale, F)
    unit, classes = unit_of(cap, scale), V.to(F)
    centres, sums = tl.load(states, mask=there, other=NOTHING), tl.load(states + 1, mask=there, other=0.0)
    moment, plain, mass = tl.zeros_like(sums), tl.zeros_like(sums), tl.zeros_like(sums)
    if EXTRAS:
        moment = tl.load(states + 2, mask=there, other=0.0)
    if GENERAL:
        plain, mass = tl.load(states + 3, mask=there, other=0.0), tl.load(states + 4, mask=there, other=0.0)
    top, sums, moment, plain, mass = merge(centres, sums, moment, plain, mass, unit, 1)
    z_y, w_y, ignored = top, tl.full((ROWS,), 1.0, F), row < 0
    if not SOFT:
        y, ignored = label(tl.load(target + row, mask=here, other=ignore_index), V, ignore_index)
        some = row < tl.where(V > 0, N, 0)
        if x is None:
            z_y = tl.sum(tl.load(states + 6, mask=there, other=0.0), 1)
        else:
            z_y = tl.load(x + line(row, x_stride, x_group, x_outer, 1) + y, mask=some, other=NOTHING).to(F)
            if GENERAL:
                z_y = squashed(z_y, cap, scale)
        if weight is not None:
            w_y = tl.load(weight + y, mask=some, other=0.0)
    log_sum = tl.log(sums)
    centre = top * unit
    lost = tl.fma(top, unit + tl.zeros_like(top), -centre)  # what rounding takes from the centre, the log keeps
    value, log_prob, mass, entropy = finalize(
        sums, moment, plain, mass, centre + log_sum, log_sum, (z_y - top) * unit, w_y, eps, k, classes, SOFT
    )
    log_sum += tl.where(lost == lost, lost, 0.0)
    if EXTRAS:
        column = tl.load(states + 5, mask=there, other=0.0).to(tl.int64) + slice * BLOCK
        largest = tl.min(tl.where(centres == top[:, None], column, V - 1), 1)
        tl.store(argmax + row, tl.where(ignored, 0, largest), mask=here)
        if rank is not None:
            above = tl.sum(tl.load(states + 6, mask=there, other=0.0).to(tl.int64), 1)
            tl.store(rank + row, tl.where(ignored, 0, above), mask=here)
    # Of an ignored row there are no states: what was read is whatever the memory held.
    tl.store(loss + row, tl.where(ignored, 0.0, value), mask=here)
    tl.store(stats + row, tl.where(ignored, 0.0, centre), mask=here)
    tl.store(stats + N + row, tl.where(ignored, 0.0, log_sum), mask=here)
    tl.store(stats + 2 * N + row, tl.where(ignored, 0.0, log_prob), mask=here)
    tl.store(stats + 3 * N + row, tl.where(ignored, 0.0, mass), mask=here)
    tl.store(stats + 4 * N + row, tl.where(ignored, 0.0, entropy), mask=here)


@triton.jit
def spread(
    x, grad, first, last, V, weight, probs, classes, eps, centre, log_sum, A, E, C, cap, scale,
    F: tl.constexpr, GENERAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of some columns from their row's statistics, but for what a target adds to its own."""
    columns, unit = tl.arange(0, BLOCK), unit_of(cap, scale)
    for start in range(first, last, BLOCK):
        z = logits(x + start, columns, V - start, cap, scale, F, GENERAL)
        r = tl.fma(z, unit, -centre)
        p = tl.exp2(tl.fma(r, number(LOG2E, F), -log_sum * LOG2E))
        dx = A * p
        if GENERAL:
            w = weights(weight, probs, start + columns, V, classes, eps, F)
            dx = slope(epilogue(A, E, C, p, r, w), z, cap)
        tl.store(grad + start + columns, dx, mask=columns < V - start)


@kernel
def row_grad(
    x, x_stride: tl.int64, x_group, x_outer: tl.int64,
    target, target_stride: tl.int64, target_group, target_outer: tl.int64, weight, V, N: tl.int64,
    ignore_index: tl.int64, label_smoothing: tl.float64, z_loss: tl.float64, softcap: tl.float64,
    logit_scale: tl.float64,
    g, g_stride: tl.int64, upstream: tl.float64, token_weight, token_stride: tl.int64, denominator, unless_one,
    lse, lse_stride: tl.int64, log_prob, log_prob_stride: tl.int64, entropy, entropy_stride: tl.int64,
    stats, grad, grad_stride: tl.int64, grad_group, grad_outer: tl.int64,
    GENERAL: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid (N, parts). The gradient of PART columns of a row, from its statistics."""
    F: tl.constexpr = stats.dtype.element_ty
    SOFT: tl.constexpr = target.dtype.element_ty.is_floating()
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * PART
    up, done = weighted_upstream(
        g, row * g_stride, upstream, token_weight, row * token_stride, denominator, unless_one, F
    )
    if done:
        return
    up_lse, up_log_prob = at(lse, row * lse_stride, 0.0, F), at(log_prob, row * log_prob_stride, 0.0, F)
    up_entropy = at(entropy, row * entropy_stride, 0.0, F)
    y, w_y, ignored, probs = 0, number(1.0, F), False, None
    if SOFT:
        probs = target + line(row, target_stride, target_group, target_outer, VECTOR)
    else:
        y, ignored = label(tl.load(target + row), V, ignore_index)
        w_y = at(weight, y, 1.0, F)
        up, up_log_prob = tl.where(ignored, 0.0, up), tl.where(ignored, 0.0, up_log_prob)
        up_lse, up_entropy = tl.where(ignored, 0.0, up_lse), tl.where(ignored, 0.0, up_entropy)
    columns, V, classes = tl.arange(0, BLOCK), V // VECTOR * VECTOR, V.to(F)
    last = tl.minimum(first + PART, V)
    x += line(row, x_stride, x_group, x_outer, VECTOR)
    grad += line(row, grad_stride, grad_group, grad_outer, VECTOR)
    if (up == 0) & (up_lse == 0) & (up_log_prob == 0) & (up_entropy == 0):
        for start in range(first, last, BLOCK):
            tl.store(grad + start + columns, tl.zeros((BLOCK,), F), mask=columns < V - start)
        return
    eps, k, cap, scale = number(label_smoothing, F), number(z_loss, F), number(softcap, F), number(logit_scale, F)
    centre, log_sum, mass, H = tl.load(stats + row), tl.load(stats + N + row), w_y, number(0.0, F)
    if GENERAL:
        mass, H = tl.load(stats + 3 * N + row), tl.load(stats + 4 * N + row)
    A, E, B, C = coefficients(
        mass, centre + log_sum, log_sum, H, w_y, eps, k, classes,
        up * scale, up_lse * scale, up_log_prob * scale, up_entropy * scale, SOFT,
    )  # fmt: skip
    z_y = number(0.0, F)
    if GENERAL and not SOFT:
        z_y = squashed(tl.load(x + y).to(F), cap, scale)  # the gradient may overwrite it
        tl.debug_barrier()
    spread(
        x, grad, first, last, V, weight, probs, classes, eps, centre, log_sum, A, E, C, cap, scale, F, GENERAL, BLOCK
    )
    if not SOFT:  # noqa: SIM102
        if (y >= first) & (y < last) & (ignored == 0):
            log_p = tl.load(stats + 2 * N + row)
            r_y, p_y = log_p + log_sum, tl.exp2(log_p * LOG2E)
            dy = slope(epilogue(A, E, C, p_y, r_y, w_y) - B, z_y, cap)
            tl.debug_barrier()  # over what another thread wrote there
            tl.store(grad + y, dy)
