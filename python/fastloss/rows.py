"""The torch side of the row kernels: torch.library operators, and the autograd Functions around them.

Two paths. `PerRow`: losses and statistics (N,) forward, the gradient backward; any upstream gradient. `Reduced`: a
reduced loss whose gradient is written in the forward, while each row is in cache, for the upstream gradient expected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import Backend, choose, reference
from .reduction import reduce_rows
from .saved import save, saved
from .spec import COMPUTE_DTYPE, PLAIN_TYPES, Objective, Reduction, Rows, Spec

_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
transforming = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda _: False)
_mode_depth = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_saved_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)

SPEC_SCHEMA = (
    "int ignore_index, float label_smoothing, float z_loss, float softcap, float logit_scale, int objective, "
    "float target_scale, float beta"
)
_ROWS_SCHEMA = f"Tensor input, Tensor target, Tensor? weight, Tensor? probs, {SPEC_SCHEMA}"
library = torch.library.Library("fastloss", "DEF")
library.define(f"row_loss({_ROWS_SCHEMA}, bool extras, Tensor? whole=None) -> (Tensor, Tensor, Tensor, Tensor)")
library.define(f"row_grad({_ROWS_SCHEMA}, Tensor stats, Tensor?[] upstream) -> Tensor")


def _flat(rows: Rows) -> tuple[Any, ...]:
    """The arguments of _ROWS_SCHEMA."""
    return rows.input, rows.target, rows.weight, rows.probs, *flat_spec(rows.spec)


def _record(
    input: Tensor, target: Tensor, weight: Tensor | None, probs: Tensor | None, *numbers: Any
) -> tuple[Rows, list[Any]]:
    """Rows from the arguments of _ROWS_SCHEMA, and what follows them."""
    spec, rest = record_spec(numbers)
    return Rows(input, target, weight, spec, probs), rest


def flat_spec(spec: Spec) -> tuple[Any, ...]:
    """The arguments of SPEC_SCHEMA."""
    return *spec[:5], int(spec.objective), *spec[6:]


def record_spec(numbers: Sequence[Any]) -> tuple[Spec, list[Any]]:
    """The spec that stands flat at the head of `numbers`, and what follows it."""
    ignore_index, smoothing, z_loss, softcap, scale, objective, target_scale, beta, *rest = numbers
    return Spec(ignore_index, smoothing, z_loss, softcap, scale, Objective(objective), target_scale, beta), rest


@torch.library.impl(library, "row_loss", "CompositeExplicitAutograd")
def _row_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, (extras, *whole) = _record(*args)
    return choose(rows).row_loss(rows, extras, *whole)


@torch.library.impl(library, "row_grad", "CompositeExplicitAutograd")
def _row_grad(*args: Any) -> Tensor:
    rows, (stats, upstream) = _record(*args)
    return choose(rows).row_grad(rows, stats, upstream).contiguous()  # as its fake says


@torch.library.register_fake("fastloss::row_loss", lib=library)
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, (extras, *_) = _record(*args)
    N, new = rows.N, rows.input.new_empty
    ranked = extras and rows.spec.objective == Objective.INDEX
    argmax, rank = new(N if extras else 0, dtype=torch.int64), new(N if ranked else 0, dtype=torch.int64)
    return new(N, dtype=rows.compute_dtype), new((5, N), dtype=rows.compute_dtype), argmax, rank


@torch.library.register_fake("fastloss::row_grad", lib=library)
def _(input: Tensor, *rest: Any) -> Tensor:
    return input.new_empty(input.shape)


def eager(*tensors: Tensor | None) -> bool:
    """Whether plain tensors meet no tracing and no dispatch mode: then the backend is called without the dispatcher,
    which costs more than the rest of a small call. A wrapper subclass has no address, and is the dispatcher's."""
    if _is_compiling() or _mode_depth():
        return False
    for t in tensors:  # no generator: a small call asks this twice  # noqa: SIM110
        if t is not None and type(t) not in PLAIN_TYPES:
            return False
    return True


class RowLoss(NamedTuple):
    """`reference.RowResult`, the argmax, and the rank of a class index (else empty), from one pass; without extras the
    statistics are None."""

    loss: Tensor
    lse: Tensor | None = None
    log_prob: Tensor | None = None
    entropy: Tensor | None = None
    argmax: Tensor | None = None
    rank: Tensor | None = None
    logit: Tensor | None = None  # transformed, of a class index
    target_weight: Tensor | None = None  # of rows whose classes other ranks have


class PerRow(torch.autograd.Function):
    """(*rows, extras, inplace) -> loss (N,), or with extras the fields of RowLoss."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        spec: Spec,
        probs: Tensor | None,
        extras: bool,
        inplace: bool,
    ) -> Any:
        rows = Rows(input, target, weight, spec, probs)
        loss, stats, argmax, rank = call_row_loss(rows, extras)
        save(ctx, input, target, weight, probs, stats)
        ctx.spec, ctx.inplace = spec, inplace
        if not extras:
            return loss
        ctx.set_materialize_grads(False)
        indexed = spec.objective == Objective.INDEX
        logit = reference.target_logits(rows) if indexed else loss.new_empty(0)
        ctx.mark_non_differentiable(argmax, rank, *(() if indexed else (logit,)))
        return loss, stats[0] + stats[1], stats[2].clone(), entropy_of(stats), argmax, rank, logit

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        input, target, weight, probs, stats = saved(ctx)
        rows = Rows(input, target, weight, ctx.spec, probs)
        if (
            ctx.spec.objective != Objective.INDEX
        ):  # without an index the logit is empty, which traced code differentiates
            upstream = upstream[:6]
        four, nothing = _upstream_of(*upstream), [None] * 6
        if all(g is None for g in four):
            return None, *nothing
        if not _is_compiling() and any(map(needs_formula, four)):
            _refuse_inplace_twice(ctx.inplace)
            return _formula_grad(
                lambda: reference.row_result(reference.quiet(rows, *unbatched(four))), input, four
            ), *nothing
        grad = call_row_grad(rows, stats, four, input.detach() if ctx.inplace else None)
        if ctx.inplace:
            _tell_overwritten(input)
        return grad, *nothing


def _upstream_of(
    loss: Tensor | None,
    lse: Tensor | None = None,
    log_prob: Tensor | None = None,
    entropy: Tensor | None = None,
    argmax: Tensor | None = None,
    rank: Tensor | None = None,
    logit: Tensor | None = None,
) -> list[Tensor | None]:
    """Those of (loss, lse, log_prob, entropy), from those of the fields of RowLoss: a logit is lse + log_prob."""
    if logit is not None:
        lse, log_prob = (logit if g is None else g + logit for g in (lse, log_prob))
    return [loss, lse, log_prob, entropy]


def entropy_of(stats: Tensor) -> Tensor:
    """(N,), as users get it: what rounding leaves below zero would be NaN in a square root. The gradient is made of the
    statistic itself."""
    return stats[4].clamp(min=0)


def call_row_loss(rows: Rows, extras: bool, whole: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, statistics, argmax and rank, through the dispatcher only where someone listens there. `whole`: see
    native.row_loss."""
    given = () if whole is None else (whole,)
    if eager(*rows.tensors()):
        return choose(rows).row_loss(rows, extras, *given)
    return torch.ops.fastloss.row_loss(*_flat(rows), extras, *given)


def call_row_grad(rows: Rows, stats: Tensor, upstream: list[Tensor | None], out: Tensor | None = None) -> Tensor:
    """The gradient from the statistics, likewise."""
    if eager(*rows.tensors()):
        return choose(rows).row_grad(rows, stats, upstream, out)
    return torch.ops.fastloss.row_grad(*_flat(rows), stats, upstream)


def per_row(rows: Rows, extras: bool = False, inplace: bool = False) -> RowLoss:
    """Losses and, with `extras`, statistics of each row; differentiable."""
    out = PerRow.apply(*rows, extras, inplace)
    return RowLoss(*out) if extras else RowLoss(out)


class Selected(torch.autograd.Function):
    """(input, index (N, K), spec, extras) -> (log-probabilities (N, K), entropy (N,) or empty). Its gradient is that of
    the cross-entropy of those classes with the negative upstream gradient as their probabilities."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, index: Tensor, spec: Spec, extras: bool) -> tuple[Tensor, Tensor]:
        none = input.new_zeros(index.shape, dtype=COMPUTE_DTYPE[input.dtype])
        rows = Rows(input, index, None, spec, none)
        _, stats, *_ = call_row_loss(rows, extras)
        save(ctx, input, index, stats)
        ctx.spec, ctx.extras = spec, extras
        ctx.set_materialize_grads(False)
        listed = rows.logits_of(torch.where(index == spec.ignore_index, 0, index))
        log_prob = selected_log_probs(reference.transform(listed, spec), rows, stats)
        return log_prob, entropy_of(stats) if extras else stats.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        input, index, stats = saved(ctx)
        chosen, entropy = upstream[0], upstream[1] if ctx.extras else None  # else it is empty, and may have a gradient
        if not _is_compiling() and any(map(needs_formula, upstream)):
            rows, factors = Rows(input, index, None, ctx.spec), unbatched(upstream)
            outputs = lambda: reference.selected(reference.quiet(rows, *factors))  # noqa: E731
            return _formula_grad(outputs, input, list(upstream)), None, None, None
        if chosen is None and entropy is None:
            return None, None, None, None
        rows = Rows(input, index, None, ctx.spec, stats)
        return call_row_grad(*selected_upstream(rows, stats, chosen, entropy)), None, None, None


def selected_log_probs(z: Tensor, rows: Rows, stats: Tensor) -> Tensor:
    """Of the listed classes, (N, K), from their transformed logits; 0 where ignored."""
    centre, log_sum = stats.unsqueeze(-1).unbind()[:2]
    log_prob = ((z - centre) - log_sum).clamp(max=0)  # no probability above one by rounding
    return torch.where(rows.target != rows.spec.ignore_index, log_prob, 0)


def selected_upstream(
    rows: Rows, stats: Tensor, chosen: Tensor | None, entropy: Tensor | None
) -> tuple[Rows, Tensor, list[Tensor | None]]:
    """Rows, statistics and upstream gradients of that cross-entropy."""
    probs = stats.new_zeros(rows.target.shape)
    if chosen is not None:
        probs = torch.where(rows.target != rows.spec.ignore_index, -chosen, 0)
    stats = torch.stack([*stats[:3], probs.sum(1), stats[4]])  # the mass is the probabilities' sum
    one = (probs != 0).any(1).to(stats.dtype)  # but a row of which nothing is wanted must have none
    return rows._replace(probs=probs), stats, [one, None, None, entropy]


def selected(input: Tensor, index: Tensor, spec: Spec, extras: bool, by_formula: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, K) of chosen classes and, with `extras`, the entropy (N,); differentiable."""
    if by_formula:
        return reference.selected(Rows(input, index, None, spec))
    return Selected.apply(input, index, spec, extras)


# The upstream gradient of the last backward. A training loop's is the same at every step (1, one over the accumulation
# steps, a loss scale), so the forward writes the gradient for it; where it turns out otherwise, the backward computes
# the gradient again. A guess changes the time, never a bit of the result.
_expected_upstream = 1.0


class Reduced(torch.autograd.Function):
    """(input, (rows, reduction, backend, inplace)) -> scalar loss, in two arguments: autograd takes its time for each,
    and a small call has little of it."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, call: tuple[Rows, Reduction, Backend, bool]) -> Tensor:
        rows, to, backend, inplace = call
        # Read once: other threads may change it meanwhile. Logits that are overwritten leave no second chance, and
        # their gradient is made for one, so that a guess cannot show in its bits. So is one on a device, which learns
        # its upstream gradient only when the backward runs there.
        expected = 1.0 if inplace or backend.rescale else _expected_upstream
        assert backend.row_loss_grad is not None
        loss, grad, stats = backend.row_loss_grad(rows, to, expected, True, input.detach() if inplace else None)
        if inplace:
            _tell_overwritten(input)
        ctx.state = [grad, stats, expected, backend, inplace]
        ctx.spec, ctx.reduction = rows.spec, (to.kind, to.dtype)
        kept = None if inplace else input
        save(ctx, kept, rows.target, rows.weight, rows.probs, to.token_weight, to.normalizer)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if needs_formula(upstream):
            return _reduced_formula(ctx, upstream), None
        state = ctx.state
        grad, _, expected, backend, _ = state
        state[0] = None  # this node must not keep it alive, or .grad would be a copy
        if backend.rescale:
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


def _saved(ctx: Any) -> tuple[Rows, Reduction]:
    """What `Reduced` saved, as the records they were."""
    input, target, weight, probs, token_weight, normalizer = saved(ctx)
    kind, dtype = ctx.reduction
    return Rows(input, target, weight, ctx.spec, probs), Reduction(kind, token_weight, normalizer, dtype)


def _grad_again(ctx: Any, grad: Tensor | None, upstream: float | Tensor) -> Tensor:
    """The gradient for another upstream than the forward expected, into the same memory if it is still there. A tensor
    stays on its device: where it turns out to be one, nothing is computed there."""
    _, stats, expected, backend, inplace = ctx.state
    if not inplace:
        try:
            records = _saved(ctx)
        except RuntimeError:  # the caller changed the logits since; torch's own loss would not mind
            if grad is None:
                raise
        else:
            return backend.row_loss_grad(*records, upstream, True, grad, stats)[1]
    _refuse_inplace_twice(grad is None)
    assert grad is not None
    return grad.mul_(upstream / expected) if backend.rescale is None else backend.rescale(grad, upstream)


def needs_formula(upstream: Tensor | None) -> bool:
    """Whether a backward is itself differentiated (create_graph=True) or batched (vmap, is_grads_batched=True)."""
    return _grad_enabled() or transforming() or (upstream is not None and _is_batched(upstream))


def unbatched(upstream: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Upstream gradients that may decide what a formula reads; none where they are batched, and each sample's are
    different."""
    batched = transforming() or any(g is not None and _is_batched(g) for g in upstream)
    return [] if batched else list(upstream)


def saved_hooks_active() -> bool:
    """Whether saved-tensor hooks are set: activation checkpointing, offloading."""
    return not _is_compiling() and _saved_hooks(True) is not None


def _reduced_formula(ctx: Any, upstream: Tensor) -> Tensor:
    """The gradient as a differentiable function of the logits and of the upstream gradient."""
    _refuse_inplace_twice(ctx.state[4])
    rows, to = _saved(ctx)

    def loss() -> list[Tensor]:
        result = reference.row_result(reference.quiet(rows, to.token_weight))
        return [reduce_rows(result.loss, rows, to)]

    return _formula_grad(loss, rows.input, [upstream])


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


def reduced(rows: Rows, to: Reduction, inplace: bool = False) -> Tensor | None:
    """The mean or summed loss in one pass; None where only `per_row` will do."""
    if not eager(*rows.tensors(), to.token_weight, to.normalizer):
        return None
    backend = choose(rows)
    if backend.row_loss_grad is None:
        return None
    if not (rows.input.requires_grad and _grad_enabled()):
        return backend.row_loss_grad(rows, to, 1.0, False)[0]
    if saved_hooks_active():  # activation checkpointing, offloading: keep nothing of size V here
        return None
    return _apply_reduced(rows.input, (rows, to, backend, inplace))
