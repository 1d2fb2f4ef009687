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
def merge(centre, sum, moment, plain, mass, unit, AXIS: tl.constexpr):
    """The state of the union of disjoint parts, which lie along an axis; added in one order."""
    top = tl.max(centre, AXIS)
    tops = tl.expand_dims(top, AXIS)
    d = tl.where(centre == tops, 0.0, (centre - tops) * unit)
    sum, moment, plain = recentre(sum, moment, plain, mass, d)
    return top, tl.sum(sum, AXIS), tl.sum(moment, AXIS), tl.sum(plain, AXIS), tl.sum(mass, AXIS)
