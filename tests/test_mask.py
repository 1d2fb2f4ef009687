"""`mask=` of the cross-entropies: beside the same loss of the rows that are left (the table of cases has the rest)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engines import ONE_OF_EACH, on_engine
from torch import Tensor

import fastloss
from fastloss import lm

pytestmark = pytest.mark.usefixtures("one_thread")
N, V, H = 6, 11, 5
MASK = torch.tensor([True, False, True, True, False, True])


@pytest.fixture(params=ONE_OF_EACH, autouse=True)
def _engine(request: pytest.FixtureRequest) -> Any:
    with on_engine(request.param):
        yield


def targets(soft: bool) -> Tensor:
    g = torch.Generator().manual_seed(2)
    y = torch.randint(V, (N,), generator=g)
    return torch.rand(N, V, generator=g).softmax(1) if soft else y


def broken(x: Tensor) -> Tensor:
    """With NaN where the mask is False."""
    return x.masked_fill(~MASK[:, None], torch.nan).requires_grad_()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_that_are_masked_may_hold_anything(reduction: str, soft: bool) -> None:
    logits, y = torch.randn(N, V), targets(soft)
    x, few = broken(logits), logits[MASK].requires_grad_()
    loss = fastloss.cross_entropy(x, y, mask=MASK, reduction=reduction)
    want = F.cross_entropy(few, y[MASK], reduction=reduction)
    torch.testing.assert_close(loss[MASK] if reduction == "none" else loss, want)
    assert reduction != "none" or not loss[~MASK].any()
    (grad,), (of_few,) = (torch.autograd.grad(t.sum(), leaf) for t, leaf in ((loss, x), (want, few)))
    torch.testing.assert_close(grad[MASK], of_few)
    assert not grad[~MASK].any()


@pytest.mark.parametrize("soft", [False, True])
def test_statistics_of_masked_rows_are_zero(soft: bool) -> None:
    x, y = broken(torch.randn(N, V)), targets(soft)
    loss, stats = fastloss.cross_entropy(x, y, mask=MASK, return_stats=True)
    few, of_few = fastloss.cross_entropy(x.detach()[MASK], y[MASK], return_stats=True)
    torch.testing.assert_close(loss, few)
    for name, got, want in zip(stats._fields, stats, of_few, strict=True):
        if got is not None:
            torch.testing.assert_close(got[MASK], want, msg=name)
            assert not got[~MASK].any(), name
    (grad,) = torch.autograd.grad(loss + stats.lse.sum() + stats.entropy.sum() + stats.log_prob.sum(), x)
    assert grad.isfinite().all() and not grad[~MASK].any()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("more", [{}, {"reduction": "none"}, {"return_stats": True}], ids=str)
def test_hidden_states(more: dict[str, Any], soft: bool) -> None:
    hidden, weight, y = broken(torch.randn(N, H)), torch.randn(V, H).requires_grad_(), targets(soft)
    found = fastloss.linear_cross_entropy(hidden, weight, y, mask=MASK, **more)
    loss = found[0] if isinstance(found, tuple) else found
    want = F.cross_entropy(F.linear(hidden[MASK], weight), y[MASK], reduction=more.get("reduction", "mean"))
    torch.testing.assert_close(loss[MASK] if loss.dim() else loss, want)
    got = torch.autograd.grad(loss.sum(), (hidden, weight), retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(want.sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b)


def test_targets_of_more_dimensions() -> None:
    x, y = torch.randn(2, V, 3).requires_grad_(), torch.randint(V, (2, 3))
    mask = MASK.reshape(2, 3)
    loss = fastloss.cross_entropy(x, y, mask=mask)
    want = F.cross_entropy(x, torch.where(mask, y, -100))
    torch.testing.assert_close([loss, *torch.autograd.grad(loss, x)], [want, *torch.autograd.grad(want, x)])
    single = fastloss.cross_entropy(x[0, :, 0], y[0, 0], mask=torch.tensor(False), reduction="sum")
    assert single == 0


def test_modules() -> None:
    x, y = torch.randn(N, V), targets(False)
    want = fastloss.cross_entropy(x[MASK], y[MASK])
    torch.testing.assert_close(fastloss.CrossEntropyLoss()(x, y, mask=MASK), want)
    module = fastloss.LinearCrossEntropyLoss(H, V)
    hidden = torch.randn(N, H)
    loss = module(hidden, y, mask=MASK)
    torch.testing.assert_close(loss, F.cross_entropy(module.linear(hidden)[MASK], y[MASK]))


def test_causal_labels_are_masked_where_they_stand() -> None:
    x, labels = torch.randn(2, 4, V), torch.randint(V, (2, 4))
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]])
    loss = lm.causal_lm_loss(x, labels, mask=mask)
    torch.testing.assert_close(loss, lm.causal_lm_loss(x, labels.masked_fill(mask == 0, -100)))


X, Y, WEIGHT = torch.randn(N, V), torch.randint(V, (N,)), torch.randn(V, V)
CALLS: list[Callable[..., Tensor]] = [
    lambda mask: fastloss.cross_entropy(X, Y, mask=mask),
    lambda mask: fastloss.linear_cross_entropy(X, WEIGHT, Y, mask=mask),
]


@pytest.mark.parametrize("call", CALLS)
def test_masks_are_checked(call: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"mask: expected a bool Tensor of shape \(6,\).*float32"):
        call(MASK.float())
    with pytest.raises(ValueError, match=r"mask: expected a bool Tensor of shape \(6,\).*\(2, 3\)"):
        call(MASK.reshape(2, 3))
    with pytest.raises(TypeError, match="mask: expected a bool Tensor or None, got list"):
        call(MASK.tolist())
    with pytest.raises(RuntimeError, match="mask: expected a tensor on cpu like input, got one on meta"):
        call(MASK.to("meta"))
