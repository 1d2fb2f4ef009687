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

ROUNDING = tl.constexpr(1e-5)  # what is left of one may be rounding; of a tail without classes it would be infinite


@triton.jit
def times(weight, value):
    """0 * inf := 0. A class of zero weight, or of zero probability, does not exist."""
    return tl.where(weight == 0, 0.0, weight * value)


@triton.jit
def tanh(x):
    """Cephes' rational function near zero, where the formula for the rest would cancel; one division for both."""
    a = tl.abs(x)
    s = x * x
    near = a < 0.625
    p = tl.fma(tl.fma(s, -9.64399179425052238628e-1, -9.92877231001918586564e1), s, -1.61468768441708447952e3)
    q = tl.fma(tl.fma(s + 1.12811678491632931402e2, s, 2.23548839060100448583e3), s, 4.84406305325125486048e3)
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
def against(p, m):
    """p log(p / m), by a logarithm that is near zero where p and m are alike. Of numbers so small that m vanished,
    too."""
    ratio = tl.maximum(tl.minimum(m / tl.where(p > 0, p, 1.0), 1e37), 1e-37)
    return tl.where(p > 0, -p * tl.log(ratio), 0.0)


@triton.jit
def divergence(
    log_sum, target_log_sum, tilt, mixture, target_mixture, lse, z_loss, beta,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """(loss, what the coefficients need): of a KL `tilt` is an expectation; of JS the mixtures' divergences count."""
    if FORWARD:
        loss = (tilt - target_log_sum) + log_sum
    elif REVERSE:
        loss = (tilt - log_sum) + target_log_sum
    else:
        loss = beta * target_mixture + (1 - beta) * mixture
        tilt = mixture
    return loss + times(z_loss, lse * lse), tilt


@triton.jit
def divergence_coefficients(tilt, lse, z_loss, beta, g_loss, g_lse, FORWARD: tl.constexpr, REVERSE: tl.constexpr):
    """(A, E, Q): Q multiplies q_j, or with a mixture p_j log(p_j / m_j)."""
    A, E, Q = g_loss * (2 * z_loss * lse) + g_lse, 0.0 * g_loss, 0.0 * g_loss
    if FORWARD:
        A, Q = A + g_loss, g_loss
    elif REVERSE:
        A, E = A - g_loss * tilt, g_loss
    else:
        A, Q = A - g_loss * (1 - beta) * tilt, -g_loss * (1 - beta)
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
