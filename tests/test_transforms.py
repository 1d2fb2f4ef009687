"""Everything torch does to a function or a tensor, done to fastloss.cross_entropy: as to F.cross_entropy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engines import ONE_OF_EACH, on_engine
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.func import hessian as func_hessian

import fastloss

pytestmark = pytest.mark.usefixtures("one_thread")

N, V = 6, 37
Loss = Callable[..., Any]


@pytest.fixture(params=ONE_OF_EACH, autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    with on_engine(request.param):
        yield


def logits(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(shape or (N, V), dtype=torch.float64)).to(dtype)


def classes(*shape: int) -> Tensor:
    y = torch.randint(V, shape or (N,))
    y.view(-1)[0] = -100
    return y


def probs(dtype: torch.dtype = torch.float64) -> Tensor:
    return logits().softmax(-1).to(dtype)


def weights(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(V, dtype=torch.float64).add(0.1).to(dtype)


# name -> (target, options): the calls that torch also has.
CASES: dict[str, Callable[[], tuple[Tensor, dict[str, Any]]]] = {
    "mean": lambda: (classes(), {}),
    "sum": lambda: (classes(), {"reduction": "sum"}),
    "none": lambda: (classes(), {"reduction": "none"}),
    "smoothed": lambda: (classes(), {"label_smoothing": 0.1}),
    "weighted": lambda: (classes(), {"weight": weights()}),
    "weighted smoothed none": lambda: (
        classes(),
        {"weight": weights(), "label_smoothing": 0.2, "reduction": "none"},
    ),
    "probabilities": lambda: (probs(), {}),
    "probabilities weighted smoothed": lambda: (probs(), {"weight": weights(), "label_smoothing": 0.1}),
    "probabilities none": lambda: (probs(), {"reduction": "none"}),
}
cases = pytest.mark.parametrize("case", CASES)


def both(case: str) -> tuple[Tensor, Callable[[Loss], Callable[[Tensor], Tensor]]]:
    """Logits, and loss function -> function of the logits."""
    target, options = CASES[case]()
    return logits(), lambda loss: lambda x: loss(x, target, **options)


def same(fn: Callable[[Loss], Any], **tolerance: Any) -> None:
    torch.testing.assert_close(fn(fastloss.cross_entropy), fn(F.cross_entropy), **tolerance)


# ---- torch.func --------------------------------------------------------------------------------------------------


@cases
def test_func_gradients(case: str) -> None:
    x, of = both(case)
    v = torch.randn_like(x)
    same(lambda loss: grad(lambda x: of(loss)(x).sum())(x))
    same(lambda loss: vjp(of(loss), x)[1](torch.ones_like(of(loss)(x))))
    same(lambda loss: jvp(of(loss), (x,), (v,)))
    same(lambda loss: jacrev(of(loss))(x))
    same(lambda loss: jacfwd(of(loss))(x))


@cases
def test_func_hessian(case: str) -> None:
    _, of = both(case)
    same(lambda loss: func_hessian(lambda x: of(loss)(x).sum())(logits(N, V) * 0 + 0.1))


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_vmap(soft: bool, options: dict[str, Any]) -> None:
    x = logits(4, N, V)
    y = logits(4, N, V).softmax(-1) if soft else classes(4, N)
    same(lambda loss: vmap(lambda x, y: loss(x, y, **options))(x, y))
    same(lambda loss: vmap(lambda x: loss(x, y[0], **options))(x))
    over_targets = vmap(lambda y: fastloss.cross_entropy(x[0], y, **options))(y)  # torch's own cannot, when smoothed
    torch.testing.assert_close(over_targets, torch.stack([F.cross_entropy(x[0], t, **options) for t in y]))
    same(lambda loss: vmap(grad(lambda x, y: loss(x, y, **options).sum()))(x, y))
    same(lambda loss: vmap(lambda x, y: loss(x, y, **options), in_dims=(0, 0), chunk_size=2)(x, y))


def test_vmap_over_rows() -> None:
    x, y = logits(), torch.randint(V, (N,))
    same(lambda loss: vmap(loss)(x, y))
    same(lambda loss: vmap(grad(loss))(x, y))


# ---- derivatives of derivatives, forward-mode, batched gradients ---------------------------------------------------


@cases
def test_forward_mode(case: str) -> None:
    x, of = both(case)
    tangent = torch.randn_like(x)

    def directional(loss: Loss) -> list[Tensor]:
        with forward_ad.dual_level():
            return list(forward_ad.unpack_dual(of(loss)(forward_ad.make_dual(x, tangent))))

    same(directional)


@cases
def test_double_backward(case: str) -> None:
    x, of = both(case)
    x.requires_grad_()

    def penalty(loss: Loss) -> list[Tensor]:
        value = of(loss)(x)
        upstream = torch.linspace(1, 2, value.numel(), dtype=x.dtype).reshape(value.shape).requires_grad_()
        (first,) = torch.autograd.grad(value, x, upstream, create_graph=True)
        return [first, *torch.autograd.grad(first.square().sum() + value.sum(), [x, upstream])]

    same(penalty)
    assert torch.autograd.gradgradcheck(of(fastloss.cross_entropy), x, fast_mode=True)


@cases
def test_batched_gradients(case: str) -> None:
    x, of = both(case)
    x.requires_grad_()

    def batched(loss: Loss) -> Tensor:
        value = of(loss)(x)
        upstream = torch.linspace(-1, 2, 3 * value.numel(), dtype=x.dtype).reshape(3, *value.shape)
        return torch.autograd.grad(value, x, upstream, is_grads_batched=True)[0]

    same(batched)
    same(lambda loss: jacobian(of(loss), x, vectorize=True))
    same(lambda loss: hessian(lambda x: of(loss)(x).sum(), x, vectorize=True))


def test_vmap_over_a_backward() -> None:
    x, y = logits().requires_grad_(), classes()

    def rows(loss: Loss) -> Tensor:
        value = loss(x, y, reduction="none")
        return vmap(lambda g: torch.autograd.grad(value, x, g, retain_graph=True)[0])(torch.eye(N, dtype=x.dtype))

    same(rows)


UPSTREAM = [1.0, 0.5, 3.0, 0.0, float("nan"), 1.0, -2.0, 1e-30, 65536.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_upstream_that_differs_from_call_to_call(reduction: str, dtype: torch.dtype) -> None:
    """No backward may remember the factor of another one."""
    x, y = logits(dtype=dtype), torch.randint(V, (N,))
    exact = x.clone().double().requires_grad_()
    (unit,) = torch.autograd.grad(F.cross_entropy(exact, y, reduction=reduction), exact)
    for factor in UPSTREAM + UPSTREAM[::-1]:
        leaf = x.clone().requires_grad_()
        (fastloss.cross_entropy(leaf, y, reduction=reduction) * factor).backward()
        want = unit * factor  # bfloat16: a loss, so an upstream gradient, and a gradient, each rounded once
        tolerance = {"rtol": 0.01, "atol": 1e-37} if dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 1e-37}
        torch.testing.assert_close(leaf.grad.double(), want, equal_nan=True, **tolerance)


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_overflow_is_seen(factor: float) -> None:
    """What a GradScaler looks for: nothing finite comes of an infinite scale, and ignored rows stay zero."""
    for reduction in ("mean", "none"):
        x = logits().requires_grad_()
        (fastloss.cross_entropy(x, classes(), reduction=reduction) * factor).sum().backward()
        assert not x.grad[1:].isfinite().any()
        assert torch.equal(x.grad[0], torch.zeros(V, dtype=x.dtype))
    x = logits().requires_grad_()
    fastloss.cross_entropy(x, classes()).backward()
    assert x.grad.isfinite().all()


def test_a_factor_leaves_no_trace_in_the_bits() -> None:
    x, y = logits(64, 1000, dtype=torch.float32), torch.randint(1000, (64,))

    def gradient(factor: float) -> Tensor:
        leaf = x.clone().requires_grad_()
        (fastloss.cross_entropy(leaf, y) * factor).backward()
        return leaf.grad

    first = [gradient(f) for f in (1.0, 0.3, 1.0, 0.3, 0.3)]
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], first[3]) and torch.equal(first[1], first[4])


@cases
def test_retain_graph(case: str) -> None:
    def thrice(loss: Loss) -> list[Tensor]:
        torch.manual_seed(1)
        x, of = both(case)
        x.requires_grad_()
        value = of(loss)(x).sum()
        out = [torch.autograd.grad(value, x, torch.tensor(f), retain_graph=True)[0] for f in (1.0, 3.0, 1.0)]
        value.backward(retain_graph=True)
        value.backward()
        return [*out, x.grad]

    same(thrice)


def test_second_backward_without_retain_graph_raises() -> None:
    for reduction in ("mean", "none"):
        value = fastloss.cross_entropy(logits().requires_grad_(), classes(), reduction=reduction).sum()
        value.backward()
        with pytest.raises(RuntimeError, match="second time"):
            value.backward()


def test_gradients_of_probabilities_and_of_our_vectors() -> None:
    x, q, y, w = logits().requires_grad_(), probs().requires_grad_(), torch.randint(V, (N,)), weights()
    tw, n = torch.rand(N, dtype=torch.float64, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    same(lambda loss: torch.autograd.grad(loss(x, q, w, label_smoothing=0.1), [x, q]))
    rows = F.cross_entropy(x, y, reduction="none")
    for reduction, want in (("mean", (rows * tw).sum() / tw.sum()), ("sum", (rows * tw).sum())):
        got = fastloss.cross_entropy(x, y, token_weight=tw, reduction=reduction)
        torch.testing.assert_close(
            torch.autograd.grad(got, [x, tw]), torch.autograd.grad(want, [x, tw], retain_graph=True)
        )
    got = fastloss.cross_entropy(x, y, normalizer=n)
    want = F.cross_entropy(x, y, reduction="sum") / n
    torch.testing.assert_close(torch.autograd.grad(got, [x, n]), torch.autograd.grad(want, [x, n]))


def test_through_a_graph_and_frozen_parts() -> None:
    """Neither argument is a leaf; or the logits want no gradient but the probabilities do."""
    a, b = logits().requires_grad_(), logits().requires_grad_()
    same(lambda loss: torch.autograd.grad(loss(a.tanh(), b.softmax(-1)), [a, b]))
    same(lambda loss: torch.autograd.grad(loss(a.detach(), b.softmax(-1)), b))
    same(lambda loss: loss(a.detach(), classes(N)).requires_grad, rtol=0, atol=0)
    with torch.no_grad():
        assert not fastloss.cross_entropy(a, b.detach().softmax(-1)).requires_grad
    with torch.inference_mode():
        same(lambda loss: loss(a, b.softmax(-1)))


# ---- statistics ----------------------------------------------------------------------------------------------------


def textbook_stats(x: Tensor, y: Tensor, cap: float, scale: float) -> dict[str, Tensor]:
    z = cap * torch.tanh(scale * x / cap)
    p = z.softmax(-1)
    lse = z.logsumexp(-1)
    log_prob = z.gather(-1, y[:, None])[:, 0] - lse
    return {"lse": lse, "log_prob": log_prob, "entropy": -(p * (z - lse[:, None])).sum(-1)}


@pytest.mark.parametrize("name", ["lse", "log_prob", "entropy"])
def test_statistics_twice_differentiable(name: str) -> None:
    x, y = logits().requires_grad_(), torch.randint(V, (N,))

    def derivatives(value: Tensor) -> list[Tensor]:
        g = torch.linspace(0.5, 2, N, dtype=x.dtype)
        (first,) = torch.autograd.grad(value, x, g, create_graph=True)
        return [value, first, *torch.autograd.grad(first.pow(3).sum(), x)]

    loss, stats = fastloss.cross_entropy(x, y, return_stats=True, softcap=5.0, logit_scale=0.7)
    for got, want in zip(
        derivatives(getattr(stats, name)), derivatives(textbook_stats(x, y, 5.0, 0.7)[name]), strict=True
    ):
        torch.testing.assert_close(got, want)
    assert not stats.argmax.requires_grad and stats.correct.dtype == torch.bool
    both_ways = torch.autograd.grad(loss + getattr(stats, name).sum(), x, retain_graph=True)[0]
    torch.testing.assert_close(
        both_ways, sum(torch.autograd.grad(t, x, retain_graph=True)[0] for t in (loss, getattr(stats, name).sum()))
    )


# ---- autocast ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(cast: torch.dtype, dtype: torch.dtype, reduction: str, soft: bool) -> None:
    x, y = logits(dtype=dtype), probs(dtype) if soft else classes()
    leaves, values = [], []
    for loss in (fastloss.cross_entropy, F.cross_entropy):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", cast):
            value = loss(leaf, y, reduction=reduction)
        value.sum().backward()
        leaves.append(leaf.grad)
        values.append(value)
    assert values[0].dtype == values[1].dtype and leaves[0].dtype == leaves[1].dtype
    exact = F.cross_entropy(x.double(), y.double() if soft else y, reduction=reduction)
    torch.testing.assert_close(values[0].double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*leaves, rtol=0.02, atol=2e-2 if dtype.itemsize == 2 else 1e-5)


def test_autocast_of_a_model() -> None:
    layer, h, y = torch.nn.Linear(8, V), torch.randn(N, 8), classes()
    with torch.autocast("cpu", torch.bfloat16):
        same(lambda loss: loss(layer(h), y), rtol=1e-2, atol=1e-2)
        assert fastloss.cross_entropy(layer(h), y).dtype == torch.float32
        x, weight = logits(dtype=torch.bfloat16), weights(torch.float32)
        same(lambda loss: loss(x, y, weight=weight), rtol=1e-2, atol=1e-2)


# ---- modules -------------------------------------------------------------------------------------------------------


def test_modules_copy_pickle_and_load() -> None:
    module = fastloss.CrossEntropyLoss(weights(), label_smoothing=0.1, z_loss=1e-3, softcap=9.0, logit_scale=0.5)
    assert isinstance(module, torch.nn.CrossEntropyLoss)
    x, y = logits(), classes()
    want = module(x, y)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)):
        assert type(other) is fastloss.CrossEntropyLoss
        assert torch.equal(other(x, y), want)
    assert list(module.state_dict()) == list(torch.nn.CrossEntropyLoss(weights()).state_dict()) == ["weight"]
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 9.0, "logit_scale": 0.5}
    other = fastloss.CrossEntropyLoss(torch.ones(V).double(), **options)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x, y), want)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({"weight": torch.ones(V + 1)})
    assert module.to(torch.float32).weight.dtype == torch.float32


def test_module_takes_the_batch_options_in_the_call() -> None:
    x, y, tw = logits(), classes(), torch.rand(N)
    module = fastloss.CrossEntropyLoss(reduction="sum", return_stats=True)
    got = module(x, y, token_weight=tw, normalizer=7)
    want = fastloss.cross_entropy(x, y, reduction="sum", token_weight=tw, normalizer=7, return_stats=True)
    torch.testing.assert_close(got[0], want[0])
    assert torch.equal(got[1].lse, want[1].lse)
