"""Any cut of the vocabulary equals no cut: looked for by hypothesis."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from cases import Case
from engines import ISAS, on_engine
from test_parts import ALL, check, threads_as_ranks
from torch import Tensor

import fastloss
from fastloss import VocabShard
from fastloss.backends import native

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def cut_anywhere(draw: st.DrawFn) -> tuple[Case, int, int, list[int], int]:
    """A case, N, V, cuts (parts may be empty), and a seed."""
    V = draw(st.sampled_from([1, 2, 7, 33, 131, 2049]))
    cuts = sorted(draw(st.lists(st.integers(0, V), min_size=0, max_size=5)))
    return draw(st.sampled_from(ALL)), draw(st.integers(1, 5)), V, [0, *cuts, V], draw(st.integers(0, 2**32))


@SETTINGS
@given(cut_anywhere())
def test_any_cut_equals_no_cut(drawn):
    case, N, V, cuts, seed = drawn
    with fastloss.use_backend("cpu"):
        check(case, N, V, cuts, torch.Generator().manual_seed(seed))


@st.composite
def plain_call(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, Any], list[int], int]:
    """Logits, class indices, options and cuts into parts that have classes, of a loss that merges natively."""
    V, N = draw(st.integers(2, 300)), draw(st.integers(0, 5))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    x = (torch.randn(N, V, generator=g) * draw(st.sampled_from([1.0, 30.0, 1e4]))).to(dtype)
    y = torch.randint(V, (N,), generator=g)
    if draw(st.booleans()):  # a part of no probability
        x[:, V // 2 :] = -torch.inf
        y %= V // 2
    for i in draw(st.sets(st.integers(0, max(N - 1, 0)))) if N else ():
        y[i] = -100
    options: dict[str, Any] = draw(
        st.sampled_from(
            [
                {},
                {"reduction": "sum"},
                {"normalizer": 3.0},
                {"normalizer": torch.tensor(7)},
                {"softcap": 20.0},
                {"inplace": True},
            ]
        )
    )
    inside = st.integers(1, V - 1)
    cuts = sorted(draw(st.sets(inside, min_size=1, max_size=5)))
    return x, y, options, [0, *cuts, V]


@pytest.mark.parametrize("isa_name", ISAS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(call=plain_call())
def test_parts_that_merge_natively(isa_name, call):
    """Values and gradients of float64 and the textbook, as good as torch's of the whole vocabulary."""
    x, y, options, cuts = call
    textbook = {name: value for name, value in options.items() if name == "reduction"}
    reductions = {"reduction": "sum"} if "normalizer" in options else textbook

    def oracle(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = x.to(dtype).requires_grad_()
        z = options["softcap"] * torch.tanh(x / options["softcap"]) if "softcap" in options else x
        loss = torch.nn.functional.cross_entropy(z, y, **reductions) / options.get("normalizer", 1)
        (grad,) = torch.autograd.grad(loss, x)
        return loss.detach().double(), torch.where((y == -100)[:, None], 0, grad).double()

    def on_rank(rank: int) -> tuple[Tensor, Tensor]:
        part = slice(*cuts[rank : rank + 2])
        own = x[:, part].clone().requires_grad_()
        logits = own.clone() if "inplace" in options else own
        loss = fastloss.cross_entropy(logits, y, shard=VocabShard(part.start, part.stop, cuts[-1]), **options)
        (grad,) = torch.autograd.grad(loss, own)
        return loss.detach(), grad

    merged = patch.object(native, "merge_parts", wraps=native.merge_parts)
    with on_engine(isa_name), merged as merging, threads_as_ranks(len(cuts) - 1) as run:
        found = run(on_rank)
    assert merging.call_count == len(cuts) - 1
    assert all(torch.equal(loss, found[0][0]) or loss.isnan() for loss, _ in found)
    want, theirs = oracle(x, torch.float64), oracle(x, x.dtype)
    got = found[0][0].double(), torch.cat([grad for _, grad in found], 1).double()
    eps = torch.finfo(x.dtype).eps
    for ours, exact, other in zip(got, want, theirs, strict=True):
        assert torch.equal(ours.isfinite(), exact.isfinite())
        error, allowed = (
            (t - exact).nan_to_num(posinf=0, neginf=0).abs().amax() if t.numel() else 0 for t in (ours, other)
        )
        assert error <= allowed + 4 * eps * max(
            1.0, float(exact.nan_to_num(posinf=0).abs().max()) if exact.numel() else 1
        )
