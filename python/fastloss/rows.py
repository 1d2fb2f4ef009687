"""The torch side of the row kernels: torch.library operators, and the autograd Functions around them.

Two entrances. `PerRow`: losses and statistics (N,) forward, the gradient backward; any upstream gradient. `Reduced`: a
reduced loss whose gradient is written in the forward, while each row is in cache, for the upstream gradient expected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import choose, reference
from .reduction import reduce_rows
from .spec import Spec

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
transforming = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda _: False)
_mode_depth = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_saved_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)

_SPEC_SCHEMA = "int ignore_index, float label_smoothing, float z_loss, float softcap, float logit_scale"
_library = torch.library.Library("fastloss", "DEF")
_library.define(
    f"row_loss(Tensor input, Tensor target, Tensor? weight, {_SPEC_SCHEMA}, bool extras) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"row_grad(Tensor input, Tensor target, Tensor? weight, {_SPEC_SCHEMA}, Tensor stats, Tensor?[] upstream) -> Tensor"
)


@torch.library.impl(_library, "row_loss", "CompositeExplicitAutograd")
def _row_loss(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *spec, extras = rest
    return choose(input, target).row_loss(input, target, weight, Spec(*spec), extras)


@torch.library.impl(_library, "row_grad", "CompositeExplicitAutograd")
def _row_grad(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> Tensor:
    *spec, stats, upstream = rest
    return choose(input, target).row_grad(input, target, weight, Spec(*spec), stats, upstream)


@torch.library.register_fake("fastloss::row_loss", lib=_library)
def _(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    N = input.shape[0]
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    argmax = input.new_empty(N if rest[-1] else 0, dtype=torch.int64)
    return input.new_empty(N, dtype=dtype), input.new_empty((5, N), dtype=dtype), argmax


@torch.library.register_fake("fastloss::row_grad", lib=_library)
def _(input: Tensor, *rest: Any) -> Tensor:
    return input.new_empty(input.shape)


def _eager(input: Tensor) -> bool:
    """Whether a plain tensor meets no tracing and no dispatch mode: then the backend is called without the dispatcher,
    which costs more than the rest of a small call."""
    return not _is_compiling() and type(input) in _PLAIN_TYPES and _mode_depth() == 0


class RowLoss(NamedTuple):
    """`reference.RowResult` and the argmax, from one pass; without extras the statistics are None."""

    loss: Tensor
    lse: Tensor | None = None
    log_prob: Tensor | None = None
    entropy: Tensor | None = None
    argmax: Tensor | None = None


class PerRow(torch.autograd.Function):
    """(input, target, weight, spec, extras, inplace) -> loss (N,), or with extras the five fields of RowLoss."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, extras: bool, inplace: bool
    ) -> Any:
        loss, stats, argmax = call_row_loss(input, target, weight, spec, extras)
        ctx.save_for_backward(input, target, weight, stats)
        ctx.spec, ctx.inplace = spec, inplace
        if not extras:
            return loss
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(argmax)
        return loss, stats[0] + stats[1], stats[2].clone(), stats[4].clone(), argmax

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        input, target, weight, stats = ctx.saved_tensors
        four: list[Tensor | None] = [*upstream, None, None, None][:4]
        if all(g is None for g in four):
            return None, None, None, None, None, None
        if not _is_compiling() and any(map(_needs_formula, four)):
            _refuse_inplace_twice(ctx.inplace)
            grad = _formula_grad(lambda: reference.row_result(input, target, weight, ctx.spec), input, four)
        elif _eager(input):
            out = {"out": input.detach()} if ctx.inplace else {}
            grad = choose(input, target).row_grad(input, target, weight, ctx.spec, stats, four, **out)
            if ctx.inplace:
                _tell_overwritten(input)
        else:
            grad = torch.ops.fastloss.row_grad(input, target, weight, *ctx.spec, stats, four)
        return grad, None, None, None, None, None


def call_row_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, extras: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, statistics and argmax, through the dispatcher only where someone listens there."""
    if _eager(input):
        return choose(input, target).row_loss(input, target, weight, spec, extras)
    return torch.ops.fastloss.row_loss(input, target, weight, *spec, extras)


def per_row(
    input: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, extras: bool = False, inplace: bool = False
) -> RowLoss:
    """Losses and, with `extras`, statistics of each row; differentiable."""
    out = PerRow.apply(input, target, weight, spec, extras, inplace)
    return RowLoss(*out) if extras else RowLoss(out)


# The upstream gradient of the last backward. A training loop's is the same at every step (1, one over the accumulation
# steps, a loss scale), so the forward writes the gradient for it; where it turns out otherwise, the backward computes
# the gradient again. A guess changes the time, never a bit of the result.
_expected_upstream = 1.0


class Reduced(torch.autograd.Function):
    """(input, ((target, weight, token_weight, normalizer, spec, reduction, out_dtype), backend, inplace)) -> scalar
    loss, in two arguments: autograd takes its time for each, and a small call has little of it."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, call: tuple[Any, ...]) -> Tensor:
        args, backend, inplace = call
        # Read once: other threads may change it meanwhile. Logits that are overwritten leave no second chance, and
        # their gradient is made for one, so that a guess cannot show in its bits. So is one on a device, which learns
        # its upstream gradient only when the backward runs there.
        expected = 1.0 if inplace or backend.rescale else _expected_upstream
        loss, grad, stats = backend.row_loss_grad(input, *args, expected, True, input.detach() if inplace else None)
        if inplace:
            _tell_overwritten(input)
        ctx.state = [grad, stats, expected, call]
        ctx.save_for_backward(None if inplace else input, *args[:4])
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if _needs_formula(upstream):
            return _reduced_formula(ctx, upstream), None
        state = ctx.state
        grad, _, expected, call = state
        state[0] = None  # this node must not keep it alive, or .grad would be a copy
        if call[1].rescale:
            grad = _grad_again(ctx, grad, upstream)
        elif grad is None or upstream.item() != expected:
            grad = _grad_again(ctx, grad, _remembered(upstream.item()))
        return grad, None


# Function.apply without its handling of torch.func, which never gets here.
_apply_reduced = super(torch.autograd.Function, Reduced).apply


def _remembered(upstream: float) -> float:
    global _expected_upstream
    if upstream != 0 and upstream - upstream == 0:  # finite
        _expected_upstream = upstream
    return upstream


def _grad_again(ctx: Any, grad: Tensor | None, upstream: float | Tensor) -> Tensor:
    """The gradient for another upstream than the forward expected, into the same memory if it is still there. A tensor
    stays on its device: where it turns out to be one, nothing is computed there."""
    _, stats, expected, ((*_, spec, reduction, out_dtype), backend, inplace) = ctx.state
    if not inplace:
        try:
            tensors = ctx.saved_tensors
        except RuntimeError:  # the caller changed the logits since; torch's own loss would not mind
            if grad is None:
                raise
        else:
            return backend.row_loss_grad(*tensors, spec, reduction, out_dtype, upstream, True, grad, stats)[1]
    _refuse_inplace_twice(grad is None)
    assert grad is not None
    return grad.mul_(upstream / expected) if backend.rescale is None else backend.rescale(grad, upstream)


def _needs_formula(upstream: Tensor | None) -> bool:
    """Whether a backward is itself differentiated (create_graph=True) or batched (vmap, is_grads_batched=True)."""
    return _grad_enabled() or transforming() or (upstream is not None and _is_batched(upstream))


def _reduced_formula(ctx: Any, upstream: Tensor) -> Tensor:
    """The gradient as a differentiable function of the logits and of the upstream gradient."""
    (*_, spec, reduction, _), _, inplace = ctx.state[3]
    _refuse_inplace_twice(inplace)
    input, target, weight, token_weight, normalizer = ctx.saved_tensors

    def total() -> list[Tensor]:
        loss = reference.row_result(input, target, weight, spec).loss
        return [reduce_rows(loss, target, weight, token_weight, normalizer, spec, reduction)]

    return _formula_grad(total, input, [upstream])


def _formula_grad(outputs: Callable[[], Any], input: Tensor, upstream: list[Any]) -> Tensor:
    create_graph = _grad_enabled()
    with torch.enable_grad():
        pairs = [(y, g.to(y.dtype)) for y, g in zip(outputs(), upstream, strict=False) if g is not None]
        ys, gs = zip(*pairs, strict=True)
        (grad,) = torch.autograd.grad(ys, input, gs, create_graph=create_graph)
    return grad


def _tell_overwritten(input: Tensor) -> None:
    """The logits' memory holds their gradient now: whoever saved them for a backward will be told."""
    torch.autograd.graph.increment_version(input)


def _refuse_inplace_twice(misused: bool) -> None:
    if misused:
        raise RuntimeError(
            "inplace=True: the logits have been overwritten by their gradient, so that the loss can be differentiated "
            "only once; use inplace=False for create_graph=True or a second backward"
        )


def reduced(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | None,
    spec: Spec,
    reduction: str,
    out_dtype: torch.dtype,
    inplace: bool = False,
) -> Tensor | None:
    """The mean or summed loss in one pass; None where only `per_row` will do."""
    if not _eager(input):
        return None
    backend = choose(input, target)
    if backend.row_loss_grad is None:
        return None
    args = (target, weight, token_weight, normalizer, spec, reduction, out_dtype)
    if not (input.requires_grad and _grad_enabled()):
        return backend.row_loss_grad(input, *args, 1.0, False)[0]
    if _saved_hooks(True) is not None:  # activation checkpointing, offloading: keep nothing of size V here
        return None
    return _apply_reduced(input, (args, backend, inplace))
