"""Cases of the table as losses of hidden states: their logits a product, their oracle by way of all of them."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from cases import CASES, LOSS_CASES, TOLERANCE, Case
from check import error, to
from torch import Tensor

import fastloss

H = 33  # of hidden states: no multiple of anything
ROWS = 7  # that may have logits at once: chunks, and a last one that is smaller
NAMES = {
    "cross_entropy": "linear_cross_entropy",
    "kl_div_with_logits": "linear_kl_div",
    "js_div_with_logits": "linear_js_div",
    "topk_cross_entropy": "linear_topk_cross_entropy",
    "topk_kl_div": "linear_topk_kl_div",
    "selective_log_softmax": "linear_selective_log_softmax",
}
ALL_CASES = [*CASES, *LOSS_CASES]


def head(V: int, features: int, dtype: torch.dtype, g: torch.Generator, N: int = 16) -> list[Tensor]:
    """Hidden states (N, features), weight (V, features) and bias (V,), of logits of a few units."""
    sizes = ((N, features), (V, features), (V,))
    return [
        (torch.randn(s, generator=g) * k).to(dtype) for s, k in zip(sizes, (1, 2 / features**0.5, 0.5), strict=True)
    ]


class Call:
    """A case's loss from hidden states, and its oracle by way of all logits; `target` is a teacher's head for a
    divergence."""

    def __init__(self, case: Case, N: int, V: int, dtype: torch.dtype, g: torch.Generator) -> None:
        self.case, self.V = case, V
        _, target, self.options = case.inputs(N, V, dtype, g)
        self.target: Any = head(V, H + 5, dtype, g, N) if case.objective.paired else target
        self.head = head(V, H, dtype, g, N)

    def of_classes(self, part: slice) -> Call:
        """What a rank has of it."""
        own = copy(self)
        own.options, own.head = dict(self.options), [self.head[0], self.head[1][part], self.head[2][part]]
        if own.options.get("weight") is not None:
            own.options["weight"] = own.options["weight"][part]
        if self.case.objective.paired:
            own.target = [self.target[0], self.target[1][part], self.target[2][part]]
        elif not self.case.objective.indexed:
            own.target = self.target[:, part]
        return own

    def ours(self, hidden: Tensor, weight: Tensor, bias: Tensor, **more: Any) -> Tensor:
        loss = getattr(fastloss, NAMES[self.case.function])
        options = {"max_chunk_bytes": ROWS * self.V * 4, **self.options, **more}
        if not self.case.objective.paired:
            return loss(hidden, weight, self.target, linear_bias=bias, **options)
        teacher = {"target_input": self.target[0], "target_linear_weight": self.target[1]}
        return loss(hidden, weight, **teacher, linear_bias=bias, target_linear_bias=self.target[2], **options)

    def textbook(self, hidden: Tensor, weight: Tensor, bias: Tensor, **more: Any) -> Tensor:
        """In the hidden states' own dtype."""
        dtype = hidden.dtype
        options = {name: to(value, dtype) for name, value in self.options.items()} | more
        target = self.target
        target = F.linear(*(t.to(dtype) for t in target)) if isinstance(target, list) else to(target, dtype)
        return self.case.oracle(F.linear(hidden, weight, bias), target, **options)


def results(f: Callable[..., Tensor], head: list[Tensor], upstream: Tensor | None, **more: Any) -> list[Tensor]:
    """The loss and the gradients of hidden states, weight and bias."""
    leaves = [t.detach().clone().requires_grad_() for t in head]
    loss = f(*leaves, **more)
    g = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, g)]


def assert_as_good_as_torch(
    call: Call, upstream: Tensor | None = None, got: list[Tensor] | None = None, **more: Any
) -> None:
    """Loss and gradients, by default those that the call gives, against float64 of all logits."""
    got = results(call.ours, call.head, upstream, **more) if got is None else got
    more.pop("max_chunk_bytes", None)
    exact, same = (
        results(call.textbook, [t.to(d) for t in call.head], upstream, **more)
        for d in (torch.float64, call.head[0].dtype)
    )
    for name, a, b, t in zip(("loss", "hidden", "weight", "bias"), got, same, exact, strict=True):
        assert a.shape == t.shape, name
        floor = 1.0 if name == "loss" else 1.0 / len(call.head[0])  # what they usually are
        found, allowed = error(a, t, floor), error(b, t, floor)
        allowed = allowed if allowed < float("inf") else 0.0
        limit = allowed + 4 * TOLERANCE[call.head[0].dtype]
        assert found <= limit, f"{call.case.name} {name}: {found:.2e}, torch {allowed:.2e}"
