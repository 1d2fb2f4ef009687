"""The mathematics of every loss over a vocabulary, in Triton. csrc/row_loss.h has the same functions under the same
names, and docs/math.md derives each line.

    state --finalize--> row statistics and loss --coefficients--> A E B C Q --epilogue--> gradient

Logits are kept as what is multiplied last on the way to z, by `unit`: x itself without a softcap, and with one the
tanh. Differences from a row's maximum are taken before that, and keep their digits.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from .state import exp

TINY = tl.constexpr(1.2e-38)  # in the normal range, and one over it
ROUNDING = tl.constexpr(1e-5)  # what is left of one may be rounding; of a tail without classes it would be infinite


@triton.jit
def times(weight, value):
    """0 * inf := 0. A class of zero weight, or of zero probability, does not exist."""
    return tl.where(weight == 0, 0.0, weight * value)


@triton.jit
def number(x, F: tl.constexpr):
    """A float argument, which comes in double, in the compute dtype. So must literals of tl.fma, which Triton before
    3.9 takes for float32."""
    return tl.full((), x, F)


@triton.jit
def tanh(x):
    """Cephes' rational function near zero, where the formula for the rest would cancel; one division for both."""
    a = tl.abs(x)
    s = x * x
    near = a < 0.625
    F: tl.constexpr = x.dtype
    p = tl.fma(s, number(-9.64399179425052238628e-1, F), number(-9.92877231001918586564e1, F))
    p = tl.fma(p, s, number(-1.61468768441708447952e3, F))
    q = tl.fma(s + 1.12811678491632931402e2, s, number(2.23548839060100448583e3, F))
    q = tl.fma(q, s, number(4.84406305325125486048e3, F))
    e = exp(-2 * a)
    y = tl.where(near, a, 1.0) + tl.where(near, a * s * p, -2 * e) / tl.where(near, q, 1 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def squashed(x, softcap, logit_scale):
    """z / unit."""
    if softcap > 0:
        x = tanh(x * (logit_scale / softcap))
    return x


@triton.jit
def unit_of(softcap, logit_scale):
    return tl.where(softcap > 0, softcap, logit_scale)


@triton.jit
def smoothed(q, w, label_smoothing, classes):
    """q' = w ((1 - eps) q + eps / V)."""
    return w * tl.fma(q, 1 - label_smoothing, label_smoothing / classes)


@triton.jit
def finalize(
    sum, moment, plain, mass, lse, log_sum, target, weight, label_smoothing, z_loss, classes, SOFT: tl.constexpr
):
    """(loss, log_prob, mass, entropy) from a state; `target` is z_y less the centre."""
    entropy = log_sum - moment / sum
    smooth = label_smoothing / classes
    sharp = (1 - label_smoothing) * weight
    spread = plain - times(mass, log_sum)  # sum w_j log p_j
    if SOFT:
        log_prob = spread
        loss = -spread
    else:
        log_prob = target - log_sum
        log_prob = tl.where(log_prob > 0, 0.0, log_prob)  # rounding must not make a probability above one
        loss = -times(sharp, log_prob) - times(smooth, spread)
        mass = tl.fma(smooth, mass, sharp)
    loss += times(z_loss, lse * lse)
    return loss, log_prob, mass, entropy


@triton.jit
def coefficients(
    mass, lse, log_sum, entropy, weight, label_smoothing, z_loss, classes, g_loss, g_lse, g_log_prob, g_entropy,
    SOFT: tl.constexpr,
):  # fmt: skip
    """(A, E, B, C): C multiplies the class weights, or with class probabilities q', where the header writes Q."""
    A = g_loss * tl.fma(2 * z_loss, lse, mass) + g_lse
    A += times(g_entropy, log_sum - entropy)
    if SOFT:
        A -= g_log_prob * mass
        B = 0.0 * g_loss
        C = g_loss - g_log_prob
    else:
        A -= g_log_prob
        B = g_loss * (1 - label_smoothing) * weight - g_log_prob
        C = times(label_smoothing / classes, g_loss)
    return A, -g_entropy, B, C


@triton.jit
def excess(f):
    """f - log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)), without taking one from the other."""
    if f.dtype == tl.float64:
        s = f / (f + 2)
        square = s * s
        p = tl.fma(square, number(1 / 23, f.dtype), number(1 / 21, f.dtype))
        for i in tl.static_range(19, 1, -2):
            p = tl.fma(p, square, number(1 / i, f.dtype))
        y = s * tl.fma(-2 * square, p, f)
    else:
        p = tl.fma(f, 7.0376836292e-2, -1.1514610310e-1)
        p = tl.fma(p, f, 1.1676998740e-1)
        p = tl.fma(p, f, -1.2420140846e-1)
        p = tl.fma(p, f, 1.4249322787e-1)
        p = tl.fma(p, f, -1.6668057665e-1)
        p = tl.fma(p, f, 2.0000714765e-1)
        p = tl.fma(p, f, -2.4999993993e-1)
        p = tl.fma(p, f, 3.3333331174e-1)
        y = f * f * tl.fma(-f, p, 0.5)
    return y


@triton.jit
def log_quotient(ratio, y):
    """(line, excess, whether it is near zero) of log(p / m) = line - excess. Where the quotient is near one both are of
    y = (p - m) / m, which keeps what it has lost."""
    near = (ratio > 0.7072) & (ratio < 1.4142)
    line = tl.where(near, y, tl.log(tl.where(ratio < TINY, TINY, ratio)))
    return line, excess(tl.where(near, y, 0.0)), near


@triton.jit
def mixed(p, q, beta, rest):
    """(what it adds to the divergence, p log(p / m)) of m = beta q + (1 - beta) p, with rest = 1 - beta: the formula of
    Mixture in csrc/row_loss.h. Numbers so small that m vanishes add nothing to speak of."""
    d, mp, mq = q - p, rest * p, beta * q
    m = mq + mp
    reciprocal = 1 / tl.where(m < 2 * TINY, 2 * TINY, m)  # keeps a NaN
    x = d * reciprocal
    line, above, near = log_quotient(p * reciprocal, -beta * x)
    target_line, target_above, target_near = log_quotient(q * reciprocal, rest * x)
    lines = tl.where(near & target_near, (beta * rest) * d * x, tl.fma(mp, line, mq * target_line))
    divergence = lines - tl.fma(mp, above, mq * target_above)
    return tl.where(divergence < 0, 0.0, divergence), p * (line - above)


@triton.jit
def divergence(log_sum, target_log_sum, tilt, mixture, lse, z_loss, FORWARD: tl.constexpr, REVERSE: tl.constexpr):
    """The loss. `tilt` is a KL's expectation, `mixture` the sum of a mixture's entries."""
    if FORWARD:
        loss = (tilt - target_log_sum) + log_sum
    elif REVERSE:
        loss = (tilt - log_sum) + target_log_sum
    else:
        loss = mixture
    return loss + times(z_loss, lse * lse)


@triton.jit
def divergence_coefficients(tilt, lse, z_loss, rest, g_loss, g_lse, FORWARD: tl.constexpr, REVERSE: tl.constexpr):
    """(A, E, Q): Q multiplies q_j, or with a mixture p_j log(p_j / m_j), whose sum is `tilt`; rest = 1 - beta."""
    A, E, Q = g_loss * (2 * z_loss * lse) + g_lse, 0.0 * g_loss, 0.0 * g_loss
    if FORWARD:
        A, Q = A + g_loss, g_loss
    elif REVERSE:
        A, E = A - g_loss * tilt, g_loss
    else:
        A, Q = A - g_loss * rest * tilt, -g_loss * rest
    return A, E, Q


@triton.jit
def slope(dx, z, softcap):
    """phi' dx but for the logit scale, which the coefficients already hold; z as `squashed`."""
    if softcap > 0:
        dx *= tl.fma(-z, z, 1.0)
    return dx


@triton.jit
def epilogue(A, E, C, p, r, w):
    """The gradient with respect to z but for the target's own B; w: the class weights, or q'."""
    return tl.fma(tl.fma(E, tl.where(p > 0, r, 0.0), A), p, -C * w)
