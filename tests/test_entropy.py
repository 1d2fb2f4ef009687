"""Entropy is never below zero, by which rounding would make NaN of its square root; its gradient is that of the entropy
all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from cases import DTYPES
from engines import ENGINES, on_engine
from test_parts import threads_as_ranks
from torch import Tensor

import fastloss
from fastloss import VocabShard

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[*ENGINES, "triton:ptx"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """All of them."""
    with on_engine(request.param):
        yield request.param


def nearly_one_hot(dtype: torch.dtype, g: torch.Generator, V: int = 50) -> Tensor:
    """Rows of which one class has nearly all, by more and more."""
    x = torch.randn(120, V, generator=g)
    x[torch.arange(120), torch.randint(V, (120,), generator=g)] += torch.linspace(3, 60, 120)
    return x.to(dtype)


def textbook(x: Tensor) -> Tensor:
    log_p = x.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def _index(x: Tensor) -> Tensor:
    return torch.arange(len(x)) % x.shape[1]


WAYS: dict[str, Callable[..., Tensor]] = {
    "softmax_entropy": fastloss.softmax_entropy,
    "row_stats": lambda x, **how: fastloss.row_stats(x, _index(x), **how).entropy,
    "one class": lambda x, **how: fastloss.selective_log_softmax(x, _index(x), return_entropy=True, **how)[1],
    "classes": lambda x, **how: fastloss.selective_log_softmax(
        x, torch.stack([_index(x)] * 2, 1), return_entropy=True, **how
    )[1],
    "cross_entropy": lambda x, **how: fastloss.cross_entropy(x, _index(x), return_stats=True, **how)[1].entropy,
}


def check(found: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Values and, of float32 and float64, gradients of classes however rare."""
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    entropy, want = found(leaf), textbook(exact)
    assert (entropy >= 0).all()
    assert entropy.sqrt().isfinite().all()
    torch.testing.assert_close(entropy.double(), want, rtol=1e-5, atol=1e-6)
    if x.dtype in (torch.float32, torch.float64):
        (grad,), (want_grad,) = torch.autograd.grad(entropy.sum(), leaf), torch.autograd.grad(want.sum(), exact)
        rare = exact < x.amax(-1, keepdim=True) - 2
        torch.testing.assert_close(grad.double()[rare], want_grad[rare], rtol=2e-4, atol=1e-37)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_nearly_one_hot(engine, way, dtype, generator):
    check(WAYS[way], nearly_one_hot(dtype, generator))


@pytest.mark.parametrize("way", WAYS)
def test_one_class_and_no_number(engine, way, generator):
    """Of one class next to nothing; NaN stays NaN."""
    entropy = WAYS[way](torch.randn(64, 1, generator=generator))
    assert (entropy >= 0).all() and (entropy < 1e-6).all()
    x = nearly_one_hot(torch.float32, generator)
    x[3, 7] = torch.nan
    assert WAYS[way](x).isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["cross_entropy", "classes"])
@pytest.mark.parametrize("name", ENGINES)
def test_hidden_states(name, way, dtype, generator):
    """Of a head that copies: the logits are the hidden states."""
    x = nearly_one_hot(dtype, generator)
    eye = torch.eye(x.shape[1], dtype=dtype)
    if way == "cross_entropy":
        found = lambda x: fastloss.linear_cross_entropy(x, eye, _index(x), return_stats=True)[1].entropy  # noqa: E731
    else:
        index = torch.stack([_index(x)] * 2, 1)
        found = lambda x: fastloss.linear_selective_log_softmax(x, eye, index, return_entropy=True)[1]  # noqa: E731
    with on_engine(name):
        check(found, x)


@pytest.mark.parametrize("name", ["cpu", "cuda:host", "triton:ptx"])
@pytest.mark.parametrize("way", WAYS)
def test_parts_of_a_vocabulary(name, way, generator):
    x = nearly_one_hot(torch.float32, generator)
    cuts = [0, 20, 20, 50]

    def in_parts(x: Tensor) -> Tensor:
        shards = [VocabShard(a, b, 50) for a, b in pairwise(cuts)]
        index = _index(x)
        ways = {
            "softmax_entropy": lambda x, s: fastloss.softmax_entropy(x, shard=s),
            "row_stats": lambda x, s: fastloss.row_stats(x, index, shard=s).entropy,
            "one class": lambda x, s: fastloss.selective_log_softmax(x, index, return_entropy=True, shard=s)[1],
            "classes": lambda x, s: fastloss.selective_log_softmax(
                x, torch.stack([index] * 2, 1), return_entropy=True, shard=s
            )[1],
            "cross_entropy": lambda x, s: fastloss.cross_entropy(x, index, return_stats=True, shard=s)[1].entropy,
        }

        def on_rank(rank: int) -> tuple[Tensor, Tensor]:
            leaf = x[:, cuts[rank] : cuts[rank + 1]].detach().clone().requires_grad_()
            entropy = ways[way](leaf, shards[rank])
            return entropy.detach(), torch.autograd.grad(entropy.sum(), leaf)[0]

        with threads_as_ranks(3) as run:
            found = run(on_rank)
        grad = torch.cat([grad for _, grad in found], 1)
        return found[0][0] + (x - x.detach()).mul(grad).sum(1)  # x's gradient is `grad`

    with on_engine(name):
        check(in_parts, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch._dynamo's own
@pytest.mark.parametrize("way", WAYS)
def test_compiled(way, generator):
    check(torch.compile(WAYS[way], backend="aot_eager"), nearly_one_hot(torch.float32, generator))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forward mode in torch
@pytest.mark.parametrize("way", WAYS)
def test_transforms(way, generator):
    """Under vmap, in forward mode and twice, where the entropy is zero but for its derivatives."""
    x = nearly_one_hot(torch.float32, generator)
    entropy, exact = WAYS[way], x.double()
    assert (torch.func.vmap(entropy)(x.view(6, 20, 50)) >= 0).all()
    grad = torch.func.grad(lambda t: entropy(t).sum())(x)
    tangent = torch.randn(x.shape, generator=generator)
    value, derivative = torch.func.jvp(entropy, (x,), (tangent,))
    assert (value >= 0).all()
    _, want = torch.func.jvp(textbook, (exact,), (tangent.double(),))
    torch.testing.assert_close(derivative.double(), want, rtol=2e-4, atol=1e-6)
    want = torch.func.grad(lambda t: textbook(t).sum())(exact)
    rare = exact < exact.amax(-1, keepdim=True) - 2
    torch.testing.assert_close(grad.double()[rare], want[rare], rtol=2e-4, atol=1e-37)
    twice = []
    for f, t in (entropy, x), (textbook, exact):
        leaf = t.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(leaf).sum(), leaf, create_graph=True)
        twice.append(torch.autograd.grad((first * tangent).sum(), leaf)[0].double())
    torch.testing.assert_close(*twice, rtol=2e-4, atol=1e-6)
