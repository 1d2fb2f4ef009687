"""What is true of every divergence and every list of classes, whatever the numbers: looked for by hypothesis."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastloss

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = ("cpu", "reference")
SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(params=BACKENDS, autouse=True, scope="module")
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with fastloss.use_backend(request.param):
        yield


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Logits and target logits of one shape, of sizes around vectors and tiles, spread from nothing to thousands."""
    N, V = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 7, 16, 33, 100, 2049]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread, offset = draw(st.sampled_from([0.0, 0.1, 3.0, 50.0])), draw(st.sampled_from([0.0, -40.0, 5000.0]))
    x, u = (torch.randn(N, V, generator=g) * spread + offset for _ in "xu")
    return x, u


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]


def per_row(x: Tensor, u: Tensor, beta: float) -> Tensor:
    return fastloss.js_div_with_logits(x, u, beta=beta, reduction="none")


@SETTINGS
@given(pairs(), st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_a_divergence_is_never_negative_and_zero_of_the_same(rows, beta):
    x, u = rows
    assert (per_row(x, u, beta) >= -2e-6 * (1 + (x - u).abs().amax(1))).all()
    same = x.clone().requires_grad_()
    loss = per_row(same, x, beta)
    assert (loss.abs() <= 1e-5).all()
    assert gradient(loss.sum(), same).abs().max() <= 1e-5


@SETTINGS
@given(pairs())
def test_js_is_bounded_and_symmetric(rows):
    x, u = rows
    loss = per_row(x, u, 0.5)
    assert (loss <= math.log(2) + 1e-6).all()
    torch.testing.assert_close(loss, per_row(u, x, 0.5), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(per_row(x, u, 0.2), per_row(u, x, 0.8), rtol=1e-5, atol=1e-6)


@SETTINGS
@given(pairs(), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([1.0, -32.0, 256.0]))
def test_neither_sees_a_shift(rows, beta, shift):
    """Powers of two, which do not round: what is added to all logits of a row changes nothing."""
    x, u = (t.round(decimals=2).clamp(-64, 64).mul(4).round() / 4 for t in rows)
    torch.testing.assert_close(per_row(x + shift, u, beta), per_row(x, u, beta), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(per_row(x, u - shift, beta), per_row(x, u, beta), rtol=1e-5, atol=1e-6)


@SETTINGS
@given(pairs(), st.sampled_from([0.0, 0.3, 1.0]))
def test_gradients_add_up_to_nothing(rows, beta):
    x, u = rows
    leaf = x.clone().requires_grad_()
    grad = gradient(per_row(leaf, u, beta).sum(), leaf)
    assert grad.isfinite().all()
    assert (grad.sum(1).abs() <= 1e-5 * (1 + grad.abs().sum(1))).all()


@SETTINGS
@given(pairs(), st.permutations(range(5)))
def test_the_order_of_classes_does_not_matter(rows, order):
    x, u = rows
    if x.shape[1] != 7:
        return
    index = torch.tensor([*order, 5, 6])
    torch.testing.assert_close(per_row(x[:, index], u[:, index], 0.3), per_row(x, u, 0.3), rtol=1e-5, atol=1e-6)


@SETTINGS
@given(pairs())
def test_a_list_of_all_classes_is_a_dense_target(rows):
    """And its tail is nothing, so that lumping it changes nothing."""
    x, u = rows
    if x.shape[1] > 100:
        return
    q = u.softmax(1)
    indices = torch.arange(x.shape[1]).expand(x.shape).contiguous()
    dense = fastloss.cross_entropy(x, q, reduction="none")
    for tail in "ignore", "lump":
        listed = fastloss.topk_cross_entropy(x, indices, q, tail=tail, reduction="none")
        scale = 1 + (x - x.mean(1, keepdim=True)).abs().amax(1)
        assert ((listed - dense).abs() <= 1e-5 * scale).all()


@SETTINGS
@given(pairs(), st.integers(1, 5))
def test_lumping_the_tail_loses_information(rows, k):
    """KL of the coarser distributions is at most that of the finer (the data-processing inequality)."""
    x, u = rows
    k = min(k, x.shape[1])
    q, indices = u.softmax(1).topk(k)
    coarse = fastloss.topk_kl_div(x, indices, q, tail="lump", reduction="none")
    fine = fastloss.kl_div_with_logits(x, u, reduction="none")
    slack = 1e-5 * (1 + (x - x.mean(1, keepdim=True)).abs().amax(1))
    assert (coarse <= fine + slack).all()
    assert (coarse >= -slack).all()


@SETTINGS
@given(pairs(), st.integers(1, 6))
def test_a_class_listed_twice_counts_for_both(rows, k):
    x, _ = rows
    y = torch.randint(x.shape[1], (len(x), k))
    probs = torch.rand(len(x), k) / (2 * k)
    once = fastloss.topk_cross_entropy(x, y, 2 * probs, reduction="none")
    twice = fastloss.topk_cross_entropy(x, y.repeat(1, 2), probs.repeat(1, 2), reduction="none")
    torch.testing.assert_close(once, twice, rtol=1e-5, atol=1e-5)


@SETTINGS
@given(pairs())
def test_entropy_and_ranks(rows):
    x, _ = rows
    stats = fastloss.row_stats(x, x.argmax(1))
    assert (stats.rank == 0).all() and torch.equal(stats.argmax, x.argmax(1))
    assert (stats.entropy >= -1e-6).all() and (stats.entropy <= math.log(x.shape[1]) + 1e-5).all()
    assert (stats.log_prob <= 0).all()
    assert (
        -stats.log_prob <= stats.entropy + 1e-5 * (1 + stats.entropy)
    ).all()  # the likeliest class, at most the mean
