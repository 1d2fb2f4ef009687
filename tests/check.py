"""How a result is judged: against float64, and against the error torch makes in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import TOLERANCE, Case
from torch import Tensor


def value_and_grad(f: Callable[..., Tensor], x: Tensor, upstream: Tensor | None, *args: Any, **kwargs: Any):
    """f(x, ...) and its gradient for an upstream gradient (ones where None)."""
    x = x.detach().clone().requires_grad_()
    loss = f(x, *args, **kwargs)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
    return loss.detach(), x.grad


def to(value: Any, dtype: torch.dtype) -> Any:
    """Floating point tensors in another dtype, the rest as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def error(got: Tensor, truth: Tensor, floor: float) -> float:
    """The largest error relative to the largest true value, at least `floor`; infinite unless NaN and infinities stand
    at the same places."""
    got, truth = got.double(), truth.double()
    finite = truth.isfinite()
    if not torch.equal(finite, got.isfinite()) or not torch.equal(
        got[~finite].nan_to_num(), truth[~finite].nan_to_num()
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = truth[finite].abs().max().clamp(min=floor)
    return ((got - truth)[finite].abs().max() / scale).item()


def assert_as_good_as_torch(
    ours: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    x: Tensor,
    target: Tensor,
    options: dict[str, Any],
    upstream: Tensor | None = None,
    noise: float = 0.0,
) -> None:
    """Values and gradients: error against the float64 oracle <= that of the oracle in x's dtype + TOLERANCE.
    `noise`: the error of the float64 oracle itself, where it matters."""
    judge(value_and_grad(ours, x, upstream, target, **options), oracle, x, target, options, upstream, noise)


def judge(
    got: Sequence[Tensor],
    oracle: Callable[..., Tensor],
    x: Tensor,
    target: Tensor,
    options: dict[str, Any],
    upstream: Tensor | None = None,
    noise: float = 0.0,
) -> None:
    """As assert_as_good_as_torch, of a value and a gradient that are there already."""

    def textbook(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        exact = {name: to(value, dtype) for name, value in options.items()}
        g = None if upstream is None else upstream.to(dtype)
        return value_and_grad(oracle, x.to(dtype), g, to(target, dtype), **exact)

    truth, torch_same_dtype = textbook(torch.float64), textbook(x.dtype)
    for name, a, b, t in zip(("loss", "gradient"), got, torch_same_dtype, truth, strict=True):
        assert a.shape == t.shape, name
        assert a.dtype == x.dtype or name == "loss", name
        floor = 1.0 if name == "loss" else 1.0 / len(x)  # what a loss, and an entry of its gradient, usually are
        found, allowed = error(a, t, floor), error(b, t, floor)
        allowed = allowed if allowed < float("inf") else 0.0
        assert found <= allowed + TOLERANCE[x.dtype] + noise, f"{name}: {found:.2e}, torch {allowed:.2e}"


def assert_case(case: Case, N: int, V: int, dtype: torch.dtype, reduction: str, g: torch.Generator) -> None:
    """A case of the table at one size; what is never reduced (selective_log_softmax) is not."""
    x, y, options = case.inputs(N, V, dtype, g)
    per_row = case.function == "selective_log_softmax"
    upstream = case.upstream(N, g) if per_row or reduction == "none" else None
    options |= {} if per_row else {"reduction": reduction}
    assert_as_good_as_torch(case.loss(), case.oracle, x, y, options, upstream)
