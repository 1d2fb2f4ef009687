"""The native module: its state's algebra, its conversions, its memory, on every instruction set."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

import fastloss
from fastloss.backends import native
from fastloss.spec import Reduction, Rows, Spec

pytest.importorskip("hypothesis")
import hypothesis.strategies as st
from hypothesis import given, settings

_native = native._native


def states(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Row states of logits over some columns, with the plain sums that label smoothing needs."""
    return native.row_states(Rows(x, torch.full((len(x),), -100), weight, Spec(label_smoothing=0.5)))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-11) -> None:
    """The same state, wherever it is centred: the same lse, entropy, sum of w log p, and mass."""
    torch.testing.assert_close(meaning(a), meaning(b), rtol=tolerance, atol=tolerance)


def meaning(states: torch.Tensor) -> torch.Tensor:
    centre, total, moment, plain, mass = states.unbind(1)
    log = total.log().clamp(min=-1e9)  # of an empty part
    entropy = torch.where(total > 0, log - moment / total, 0)
    return torch.stack([centre + log, entropy, plain - torch.where(mass == 0, 0, mass * log), mass], 1)


def rows_of(numbers: list[float]) -> torch.Tensor:
    return torch.tensor([numbers, numbers[::-1]], dtype=torch.float64)


logits = st.floats(-60, 60) | st.just(-torch.inf)
row = st.lists(logits, min_size=0, max_size=40).map(rows_of)
laws = settings(max_examples=60, deadline=None, derandomize=True)


def some_weight(V: int) -> torch.Tensor:
    return (torch.arange(V) % 5).double() / 4 + 0.25


@pytest.mark.parametrize("isa_name", _native.available_isas())
@laws
@given(row, row, row)
def test_monoid_laws(isa_name, x, y, z):
    """merge is associative and commutative, and the empty state is its unit."""
    before = _native.current_isa()
    _native.use_isa(isa_name)
    try:
        x, y, z = (states(t, some_weight(t.shape[1])) for t in (x, y, z))
        finite = [s for s in (x, y, z) if s[:, 3].isfinite().all()]  # -inf in the plain sum: see test_minus_infinity
        unit = states(torch.empty(2, 0).double(), torch.empty(0).double())
        for s in (x, y, z):
            assert torch.equal(native.merge_states(s, unit), s) and torch.equal(native.merge_states(unit, s), s)
        if len(finite) == 3:
            close(native.merge_states(x, y), native.merge_states(y, x))
            close(native.merge_states(native.merge_states(x, y), z), native.merge_states(x, native.merge_states(y, z)))
    finally:
        _native.use_isa(before)


@laws
@given(st.lists(st.integers(0, 3000), max_size=5), st.sampled_from(_native.available_isas()), st.booleans())
def test_any_cut_of_the_vocabulary(cuts, isa_name, wide):
    """The states of the parts merge to the state of the whole."""
    before = _native.current_isa()
    _native.use_isa(isa_name)
    try:
        x = torch.randn(3, 3000, generator=torch.Generator().manual_seed(len(cuts)), dtype=torch.float64) * 5
        x = x if wide else x.float()
        w = some_weight(3000).to(x.dtype)
        edges = [0, *sorted(cuts), 3000]
        merged = states(x[:, :0], w[:0])
        for a, b in itertools.pairwise(edges):
            merged = native.merge_states(merged, states(x[:, a:b], w[a:b]))
        close(merged, states(x, w), 1e-11 if wide else 3e-6)
    finally:
        _native.use_isa(before)


def test_minus_infinity(isa):
    """A part of nothing but -inf weighs nothing and makes no NaN."""
    masked = states(torch.full((2, 5), -torch.inf).double(), torch.zeros(5).double())
    assert not masked.isnan().any() and (masked[:, 1:] == 0).all()
    x = states(torch.randn(2, 9).double(), some_weight(9))
    assert torch.equal(native.merge_states(masked, x), x)
    assert torch.equal(native.merge_states(x, masked), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_read_exactly(isa, dtype):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    x = bits.view(dtype).float().to(dtype)
    x = x[x.isfinite()][:, None]
    y = torch.zeros(len(x), dtype=torch.int64)
    _, stats, *_ = native.row_loss(Rows(x, y, None, Spec()), True)
    read = stats[0].double() + stats[1].double()  # the log of one exponential: tiny numbers drown in one
    large = x[:, 0].abs() >= 1e-3
    assert torch.equal(read.to(dtype)[large], x[large, 0])
    torch.testing.assert_close(read[~large], x[~large, 0].double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_16_bits(isa, dtype, generator):
    """Round to nearest even, as torch does, over all magnitudes."""
    special = torch.tensor([0.0, 65504, 65519, 65520, 65536, 1e30, 3e38, 6e-8, 3e-8, 2.98e-8, 6.1e-5, 1e-20, 1e-37])
    ties = 1 + torch.arange(4096) / 4096
    g = torch.cat([special, ties, torch.rand(5000, generator=generator) * 100, torch.tensor([torch.nan, torch.inf])])
    g = torch.cat([g, -g])
    x = torch.tensor([[0.0, -torch.inf]]).to(dtype).repeat(len(g), 1)
    y = torch.ones(len(g), dtype=torch.int64)  # all probability on the class that is not the target: dx = g
    _, stats, *_ = native.row_loss(Rows(x, y, None, Spec()), False)
    dx = native.row_grad(Rows(x, y, None, Spec()), stats, [g, None, None, None])[:, 0]
    normal = g.abs() >= torch.finfo(dtype).tiny if dtype == torch.bfloat16 else torch.ones_like(g, dtype=torch.bool)
    keep = normal | (g == 0) | g.isnan()
    torch.testing.assert_close(dx[keep], g.to(dtype)[keep], rtol=0, atol=0, equal_nan=True)


def test_target_out_of_range_writes_nothing(isa):
    x, out = torch.randn(3, 5), torch.full((3, 5), 7.0)
    for bad in 5, -1, -101, 2**40:
        y = torch.tensor([0, 1, bad])
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            native.row_loss_grad(Rows(x, y, None, Spec()), Reduction("mean", None, None, torch.float32), 1.0, True, out)
        assert (out == 7).all()


def test_gradient_memory_is_recycled():
    fastloss.empty_cache()
    x = torch.randn(1024, 4096).requires_grad_()
    y = torch.zeros(1024, dtype=torch.int64)
    fastloss.cross_entropy(x, y).backward()
    address, first = x.grad.data_ptr(), x.grad.clone()
    x.grad = None
    fastloss.cross_entropy(x, y).backward()
    assert x.grad.data_ptr() == address
    assert torch.equal(x.grad, first)
    other = torch.autograd.grad(fastloss.cross_entropy(x, y), x)[0]
    assert other.data_ptr() != address, "memory in use must not be handed out"
    assert fastloss.empty_cache() == 0
    x.grad, other = None, None
    assert fastloss.empty_cache() >= 2 * 1024 * 4096 * 4


def test_gradient_outlives_the_cache_and_the_graph():
    x = torch.randn(1024, 4096).requires_grad_()
    grad = torch.autograd.grad(fastloss.cross_entropy(x, torch.zeros(1024, dtype=torch.int64)), x)[0]
    before = grad.clone()
    fastloss.empty_cache()
    assert torch.equal(grad, before)


def test_isa_can_be_forced_and_is_checked():
    with pytest.raises(ValueError, match="isa: got 'sse9000'"):
        _native.use_isa("sse9000")
    code = "import fastloss; from fastloss import _native; print(_native.current_isa())"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "FASTLOSS_ISA": "baseline"}, capture_output=True, text=True
    )
    assert run.stdout.strip() == "baseline", run.stderr


@pytest.mark.parametrize(
    "fields",
    [
        (),
        (0, -1, 5, 5, 0, 64, 1, 0, 0, 0, 0, -100, 0.0, 0.0, 0.0, 1.0, 0, 1.0, 0.5, 1),  # a negative size
        (64, 1, 5, 5, 9, 64, 1, 0, 0, 0, 0, -100, 0.0, 0.0, 0.0, 1.0, 0, 1.0, 0.5, 1),  # no such dtype
        (0, 1, 5, 5, 0, 64, 1, 0, 0, 0, 0, -100, 0.0, 0.0, 0.0, 1.0, 0, 1.0, 0.5, 1),  # logits without an address
        (64, 1, 5, 5, 0, 0, 1, 0, 0, 0, 0, -100, 0.0, 0.0, 0.0, 1.0, 0, 1.0, 0.5, 1),  # targets without an address
        (64, 1, 5, "five", 0, 64, 1, 0, 0, 0, 0, -100, 0.0, 0.0, 0.0, 1.0, 0, 1.0, 0.5, 1),
        (64, 1, 5, 5, 0, 64, 1, 0, 0, 0, 0, -100, 0.0, 0.0, 0.0, 1.0, 7, 1.0, 0.5, 1),  # no such objective
        (64, 1, 5, 5, 0, 0, 0, 0, 0, 0, 0, -100, 0.0, 0.0, 0.0, 1.0, 4, 1.0, 0.5, 1),
    ],
)
def test_malformed_rows_are_refused(fields):
    with pytest.raises((ValueError, TypeError)):
        _native.row_states(fields, 0)
