"""The state of a row over part of the vocabulary, in Triton: csrc/row_state.h says what its fields are.

Parts keep their centre divided by `unit` (see loss.py), so that logits of 1e4 lose no digits when two are compared.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """e^x for x <= 0, by the hardware's power of two."""
    return tl.exp2(x * LOG2E)


@triton.jit
def recentre(sum, moment, plain, mass, d):
    """A state moved to a centre larger by -d. A part that is empty or all -inf weighs nothing and moves nowhere."""
    k = exp(d)
    moment = tl.where(k == 0, 0.0, k * tl.fma(d, sum, moment))
    plain = tl.where((mass == 0) | (d == float("-inf")), plain, tl.fma(d, mass, plain))
    return k * sum, moment, plain


@triton.jit
def distance(centre, tops, unit):
    """How far parts' centres lie above that of all; a part without one may be said to lie anywhere."""
    return tl.where((centre == tops) | (centre == float("-inf")), 0.0, (centre - tops) * unit)


@triton.jit
def merge_pairs(
    centre, sum, target_centre, target_sum, tilt, unit, target_unit, OF_TARGET: tl.constexpr, AXIS: tl.constexpr
):
    """The same of parts of two rows, logits and target logits: PairState in csrc/row_state.h."""
    top, target_top = tl.max(centre, AXIS), tl.max(target_centre, AXIS)
    d = distance(centre, tl.expand_dims(top, AXIS), unit)
    e = distance(target_centre, tl.expand_dims(target_top, AXIS), target_unit)
    k, target_k = exp(d), exp(e)
    weight, factor, by = sum, k, d - e
    if OF_TARGET:
        weight, factor, by = target_sum, target_k, e - d
    tilt = tl.where((factor == 0) | (weight == 0), 0.0, factor * tl.fma(by, weight, tilt))
    return top, tl.sum(k * sum, AXIS), target_top, tl.sum(target_k * target_sum, AXIS), tl.sum(tilt, AXIS)


@triton.jit
def merge(centre, sum, moment, plain, mass, unit, AXIS: tl.constexpr):
    """The state of the union of disjoint parts, which lie along an axis; added in one order."""
    top = tl.max(centre, AXIS)
    tops = tl.expand_dims(top, AXIS)
    d = tl.where(centre == tops, 0.0, (centre - tops) * unit)
    sum, moment, plain = recentre(sum, moment, plain, mass, d)
    return top, tl.sum(sum, AXIS), tl.sum(moment, AXIS), tl.sum(plain, AXIS), tl.sum(mass, AXIS)
