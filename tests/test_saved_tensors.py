"""Who keeps the logits, who may overwrite them, what their neighbours see: as with F.cross_entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engines import ONE_OF_EACH, on_engine
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastloss
from fastloss import _native

N, V = 6, 37
Loss = Callable[..., Any]

# name -> (class probabilities?, options)
CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "mean": (False, {}),
    "sum": (False, {"reduction": "sum"}),
    "none": (False, {"reduction": "none"}),
    "smoothed": (False, {"label_smoothing": 0.1}),
    "probabilities": (True, {}),
}
cases = pytest.mark.parametrize("case", CASES)
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


@pytest.fixture(params=ONE_OF_EACH, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.manual_seed(0)
    with on_engine(request.param):
        yield request.param


def logits(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(shape or (N, V), dtype=torch.float64)).to(dtype)


def classes() -> Tensor:
    return torch.tensor([-100, 0, V - 1, 3, 5, 7])


def both(case: str) -> tuple[Tensor, Callable[[Loss], Callable[[Tensor], Tensor]]]:
    """Logits, and loss function -> function of the logits."""
    soft, options = CASES[case]
    target = logits().softmax(-1) if soft else classes()
    return logits(), lambda loss: lambda x: loss(x, target, **options)


def same(fn: Callable[[Loss], Any]) -> None:
    torch.testing.assert_close(fn(fastloss.cross_entropy), fn(F.cross_entropy))


# ---- checkpointing and saved-tensor hooks --------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool, case: str) -> None:
    x, of = both(case)

    def run(loss: Loss) -> Tensor:
        leaf = x.clone().requires_grad_()
        checkpoint(lambda t: of(loss)(t * 2), leaf, use_reentrant=use_reentrant).sum().backward()
        return leaf.grad

    same(run)


@cases
def test_saved_tensors_hooks(case: str) -> None:
    x, of = both(case)
    packed = []

    def run(loss: Loss, hooks: Any) -> Tensor:
        leaf = x.clone().requires_grad_()
        with hooks:
            value = of(loss)(leaf * 2)
        value.sum().backward()
        return leaf.grad

    def counting() -> Any:
        return torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t)

    run(fastloss.cross_entropy, counting())
    assert any(t.numel() == N * V for t in packed), "the hooks see what is kept of size N x V"
    same(lambda loss: run(loss, counting()))
    same(lambda loss: run(loss, torch.autograd.graph.save_on_cpu()))


@cases
def test_hooks_forbidden_and_anomaly_mode(case: str) -> None:
    x, of = both(case)

    def run(loss: Loss) -> Tensor:
        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
            of(loss)(leaf * 2).sum().backward()
        return leaf.grad

    same(run)
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        same(run)


# ---- logits that change ----------------------------------------------------------------------------------------------


def gradients_of_changed_logits(loss: Loss, reduction: str, factor: float, times: int) -> list[Tensor]:
    torch.manual_seed(1)
    leaf = logits().requires_grad_()
    hidden = leaf * 1
    value = (loss(hidden, classes(), reduction=reduction) * factor).sum()
    with torch.no_grad():
        hidden.zero_()
    return [torch.autograd.grad(value, leaf, retain_graph=True)[0] for _ in range(times)]


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)  # which makes loss and gradient in one pass
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_logits_changed_before_the_backward(factor: float, reduction: str) -> None:
    """torch keeps the log-softmax, we the gradient: neither minds what happens to the logits."""
    same(lambda loss: gradients_of_changed_logits(loss, reduction, factor, 1))


@reductions
@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("times", [1, 2])
def test_changed_logits_never_give_a_wrong_gradient(times: int, factor: float, reduction: str) -> None:
    """An unreduced loss, and a second backward, need the logits again: torch's gradient, or torch's complaint."""
    want = gradients_of_changed_logits(F.cross_entropy, reduction, factor, times)
    try:
        got = gradients_of_changed_logits(fastloss.cross_entropy, reduction, factor, times)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(got, want)


def test_gradients_are_apart() -> None:
    """Two losses of the same logits share no memory, and neither changes the logits."""
    x = logits().requires_grad_()
    before = x.detach().clone()
    first, second = (fastloss.cross_entropy(x, classes(), label_smoothing=e) for e in (0.0, 0.1))
    a = torch.autograd.grad(first, x, retain_graph=True)[0]
    kept = a.clone()
    b = torch.autograd.grad(second, x)[0]
    c = torch.autograd.grad(first, x, torch.tensor(5.0))[0]
    assert torch.equal(a, kept) and torch.equal(x, before)
    assert len({t.data_ptr() for t in (a, b, c, x)}) == 4
    torch.testing.assert_close(c, 5 * a)


def test_gradients_accumulate() -> None:
    def run(loss: Loss) -> Tensor:
        torch.manual_seed(3)
        x = logits().requires_grad_()
        for factor in (1.0, 0.25, 0.25):
            (loss(x, classes()) * factor).backward()
        return x.grad

    same(run)


# ---- inplace=True --------------------------------------------------------------------------------------------------

# Logits (., V) of a leaf, in memory whose rows are dense and apart.
CAN: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda leaf: leaf * 1,
    "padded rows": lambda leaf: F.pad(leaf, (0, 3))[:, :V],
    "row": lambda leaf: leaf[-1:] * 1,
    "one-dimensional": lambda leaf: leaf[-1] * 1,
}


@reductions
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", CAN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_inplace_gradient(dtype: torch.dtype, shape: str, soft: bool, factor: float, reduction: str) -> None:
    x = logits(dtype=dtype)

    def run(loss: Loss, **options: Any) -> Tensor:
        leaf = x.clone().requires_grad_()
        hidden = CAN[shape](leaf)
        rows = classes()[-len(hidden) :] if hidden.dim() > 1 else classes()[-1]
        target = hidden.detach().roll(1).softmax(-1) if soft else rows
        version = hidden._version
        (loss(hidden, target, reduction=reduction, **options) * factor).sum().backward()
        assert hidden._version > version or not options
        return leaf.grad

    tolerance = {"rtol": 0.02, "atol": 2e-3} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(run(fastloss.cross_entropy, inplace=True), run(F.cross_entropy), **tolerance)


@reductions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inplace_bits_do_not_depend_on_earlier_calls(dtype: torch.dtype, reduction: str) -> None:
    """Not even after a large loss scale: what overflowed in the forward could not be divided back."""
    x = logits(dtype=dtype)

    def run(factor: float, inplace: bool) -> Tensor:
        leaf = x.clone().requires_grad_()
        loss = fastloss.cross_entropy(
            leaf * 1, classes(), reduction=reduction, inplace=inplace, out_dtype=torch.float32
        )
        (loss * factor).sum().backward()
        return leaf.grad

    first = run(1.0, inplace=True)
    assert first.isfinite().all()
    for factor in (65536.0 * 4, 0.3, 2.0**-20):
        run(factor, inplace=False)
        run(factor, inplace=False)  # the second one finds its factor expected
        assert torch.equal(run(1.0, inplace=True), first)


@reductions
def test_inplace_takes_no_memory_of_its_own(reduction: str) -> None:
    seen = []
    leaf = logits().requires_grad_()
    hidden = leaf * 1
    hidden.register_hook(lambda g: seen.append(g.data_ptr()))
    fastloss.cross_entropy(hidden, classes(), reduction=reduction, inplace=True).sum().backward()
    assert seen == [hidden.data_ptr()]


@reductions
def test_inplace_without_grad_leaves_the_logits_alone(reduction: str) -> None:
    x = logits()
    before, version = x.clone(), x._version
    with torch.no_grad():
        fastloss.cross_entropy(x, classes(), reduction=reduction, inplace=True)
    fastloss.cross_entropy(x, classes(), reduction=reduction, inplace=True)
    assert torch.equal(x, before) and x._version == version


@reductions
def test_inplace_tells_who_else_saved_the_logits(reduction: str) -> None:
    leaf = logits().requires_grad_()
    hidden = leaf * 1
    other = hidden.square().sum()
    fastloss.cross_entropy(hidden, classes(), reduction=reduction, inplace=True).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@reductions
def test_inplace_once_only(reduction: str) -> None:
    hidden = logits().requires_grad_() * 1
    loss = fastloss.cross_entropy(hidden, classes(), reduction=reduction, inplace=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()
    hidden = logits().requires_grad_() * 1
    loss = fastloss.cross_entropy(hidden, classes(), reduction=reduction, inplace=True).sum()
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(loss, hidden, create_graph=True)


CANNOT: dict[str, tuple[type[Exception], Callable[[Tensor], Tensor]]] = {
    "leaf": (RuntimeError, lambda x: x),
    "view of a leaf": (RuntimeError, lambda x: x[:, :]),
    "transposed": (ValueError, lambda x: (x * 1).t().contiguous().t()),
    "every other class": (ValueError, lambda x: torch.cat([x, x], 1)[:, ::2]),
    "expanded": (ValueError, lambda x: (x[:1] * 1).expand(N, V)),
    "overlapping": (ValueError, lambda x: (x * 1).as_strided((N, V), (1, 1))),
}


@reductions
@pytest.mark.parametrize("name", CANNOT)
def test_inplace_refuses(name: str, reduction: str) -> None:
    kind, make = CANNOT[name]
    leaf = logits().requires_grad_()
    before, hidden = leaf.detach().clone(), make(leaf)
    with pytest.raises(kind, match=r"(?i)in-?place"):
        fastloss.cross_entropy(hidden, classes(), reduction=reduction, inplace=True)
    assert torch.equal(leaf, before) and leaf.grad is None


def test_inplace_with_statistics_and_options() -> None:
    x = logits()

    def run(inplace: bool) -> Tensor:
        leaf = x.clone().requires_grad_()
        loss, stats = fastloss.cross_entropy(
            leaf * 1, classes(), z_loss=1e-2, softcap=4.0, logit_scale=0.8, return_stats=True, inplace=inplace
        )
        (loss + stats.entropy.sum() + stats.lse.square().sum()).backward()
        return leaf.grad

    assert torch.equal(run(True), run(False))


# ---- the same bits, whatever goes on around a row --------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bits_do_not_depend_on_threads_or_position(dtype: torch.dtype, isa: str) -> None:
    x, y = logits(65, 1999, dtype=dtype), torch.randint(1999, (65,))
    before, threads = _native.current_isa(), torch.get_num_threads()

    def run(x: Tensor, y: Tensor, reduction: str) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        loss, stats = fastloss.cross_entropy(leaf, y, reduction=reduction, z_loss=1e-3, return_stats=True)
        plain = fastloss.cross_entropy(leaf, y, reduction=reduction)
        return [loss.detach(), plain.detach(), stats.entropy.detach(), torch.autograd.grad(plain.sum(), leaf)[0]]

    def equal(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))

    try:
        _native.use_isa(isa)
        torch.set_num_threads(1)
        one = {r: run(x, y, r) for r in ("mean", "sum", "none")}
        torch.set_num_threads(2)
        assert all(equal(run(x, y, r), one[r]) for r in one)
        for i in (0, 1, 33, 64):  # alone, the row gets another thread, another alignment, another place in its tile
            assert equal(run(x[i : i + 1], y[i : i + 1], "none"), [t[i : i + 1] for t in one["none"]])
        order = torch.randperm(65)
        assert equal(run(x[order], y[order], "none"), [t[order] for t in one["none"]])
    finally:
        torch.set_num_threads(threads)
        _native.use_isa(before)
