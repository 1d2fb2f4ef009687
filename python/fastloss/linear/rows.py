"""The torch side of losses of hidden states, as fastloss/rows.py of logits': operators, autograd Functions around them.

`Reduced`: a reduced loss whose gradients are made in the forward, chunk by chunk, for the upstream gradient expected
(upstream.py): three products in all. `PerRow`: losses and statistics (N,) forward, for any upstream gradient; the
backward makes the logits again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..reduction import reduce_rows
from ..rows import (
    SPEC_SCHEMA,
    eager,
    entropy_of,
    flat_spec,
    library,
    needs_formula,
    record_spec,
    selected_log_probs,
    selected_upstream,
    unbatched,
)
from ..saved import save as store
from ..saved import saved as restore
from ..spec import Reduction, Rows
from . import blocks, grads
from . import upstream as guess
from .chunks import row_loss
from .heads import Head, LinearRows, stand_in

_HEAD = "Tensor hidden, Tensor head_weight, Tensor? head_bias"
_TEACHER = "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias"
_NUMBERS = f"{SPEC_SCHEMA}, SymInt limit, SymInt block_bytes, float? filter_eps"
SCHEMA = f"{_HEAD}, Tensor? target, {_TEACHER}, Tensor? weight, Tensor? probs, {_NUMBERS}"
_REDUCED = f"{SCHEMA}, Tensor? token_weight, Tensor? normalizer, bool[] needs"
library.define(f"linear_loss({_REDUCED}, Tensor? upstream=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
library.define(f"linear_loss_grad({_REDUCED}, Tensor[] made, Tensor upstream) -> (Tensor, Tensor, Tensor)")
library.define(f"linear_row_loss({SCHEMA}, bool extras) -> (Tensor, Tensor, Tensor, Tensor)")
library.define(f"linear_row_grad({SCHEMA}, Tensor stats, Tensor?[] upstream, bool[] needs) -> (Tensor, Tensor, Tensor)")


def flat(given: LinearRows) -> tuple[Any, ...]:
    """The arguments of SCHEMA."""
    rows = given.rows
    target = rows.target if given.teacher is None else None
    tensors = *given.head, target, *(given.teacher or (None, None, None)), rows.weight, rows.probs
    return *tensors, *flat_spec(rows.spec), given.limit, given.block_bytes, given.filter_eps


def distinct(*args: Any) -> list[Any]:
    """The arguments of a Function, of which Dynamo refuses a tensor that comes twice: one LM head of student and
    teacher. Its second place gets a view, and the gradient of that is autograd's to add."""
    if not torch.compiler.is_compiling():
        return list(args)
    given: list[Any] = []
    for a in args:
        given.append(a.view_as(a) if isinstance(a, Tensor) and any(a is b for b in given) else a)
    return given


def record(*args: Any) -> tuple[LinearRows, list[Any]]:
    """LinearRows from the arguments of SCHEMA, and what follows them."""
    hidden, head_weight, head_bias, target, u, teacher_weight, teacher_bias, weight, probs, *numbers = args
    head = Head(hidden, head_weight, head_bias)
    teacher = None if u is None else Head(u, teacher_weight, teacher_bias)
    logits = stand_in(head)
    spec, (limit, block_bytes, filter_eps, *rest) = record_spec(numbers)
    rows = Rows(logits, logits if target is None else target, weight, spec, probs)
    return LinearRows(rows, head, teacher, limit, block_bytes, filter_eps), rest


@torch.library.impl(library, "linear_loss", "CompositeExplicitAutograd")
def _linear_loss(*args: Any) -> tuple[Tensor, ...]:
    """(loss, gradients of hidden states, weight and bias, the upstream gradient for which those are made that are
    rounded): an upstream gradient as given, or as expected."""
    given, (token_weight, normalizer, needs, *upstream) = record(*args)
    return _loss_and_grads(given, token_weight, normalizer, needs, upstream[0] if upstream else None)


def _loss_and_grads(
    given: LinearRows,
    token_weight: Tensor | None,
    normalizer: Tensor | None,
    needs: list[bool],
    upstream: Tensor | None = None,
) -> tuple[Tensor, ...]:
    to = Reduction("sum", token_weight, normalizer, given.rows.compute_dtype)
    guessed = guess.is_guessed(given, needs)
    if upstream is not None:
        factor = upstream.to(given.rows.compute_dtype, copy=True)
    else:
        factor = guess.expected(given) if guessed else given.head.hidden.new_ones((), dtype=given.rows.compute_dtype)
    one = not guessed or (guess.on_host(factor) and factor.item() == 1)
    loss, made = _by(given, needs).loss_and_grads(given, to, needs, None if one else factor)
    return loss, *made, factor


@torch.library.impl(library, "linear_loss_grad", "CompositeExplicitAutograd")
def _linear_loss_grad(*args: Any) -> tuple[Tensor, ...]:
    """The gradients for the true upstream gradient, in their own dtypes, from what linear_loss made besides the loss;
    in memory of their own, as operators return what they make."""
    given, (*reduction, made, upstream) = record(*args)
    return tuple(_for_upstream(given, reduction, made, upstream, False))


def _for_upstream(
    given: LinearRows, reduction: list[Any], made: list[Tensor], upstream: Tensor, own: bool
) -> list[Tensor]:
    """As linear_loss_grad, whose arguments `reduction` are; in the memory of what was made if that is our `own`."""
    *made, expected = made
    (token_weight, normalizer, needs), owns, host = reduction, [own] * 3, guess.on_host(upstream)
    rounded, guessed = guess.rounded(given, needs), guess.is_guessed(given, needs)
    if guessed:
        guess.remember(given, upstream)
    if guessed and host and upstream.item() != expected.item():
        narrow = guess.narrow(given)
        again = [n and (narrow or r) for n, r in zip(needs, rounded, strict=True)]
        _, *fresh, _ = _loss_and_grads(given, token_weight, normalizer, again, upstream)
        made = [new if a else old for new, old, a in zip(fresh, made, again, strict=True)]
        owns = [a or own for a in again]
    # Equal ones may be zero, in a second backward, whose forward is told.
    ratio = None if host else torch.where(upstream == expected, 1, upstream / expected)
    whole = None if host and upstream.item() == 1 else upstream
    dtypes = [expected.dtype if t is None else t.dtype for t in given.head]
    return [
        _times(g, ratio if r else whole, dtype, mine)
        for g, r, dtype, mine in zip(made, rounded, dtypes, owns, strict=True)
    ]


_PIECE = 1 << 20  # numbers that are multiplied at once, where that takes memory


def _times(grad: Tensor, factor: Tensor | None, dtype: torch.dtype, own: bool) -> Tensor:
    """grad times factor in a dtype, rounded once; in its own memory if that may be."""
    own = own and grad.dtype == dtype
    if factor is None:
        return grad if own else grad.to(dtype, copy=True)
    if own and dtype == factor.dtype:
        return grad.mul_(factor)
    out = grad if own else torch.empty_like(grad, dtype=dtype)
    rows = max(1, _PIECE // max(1, grad[:1].numel()))
    for to, some in zip(out.split(rows), grad.split(rows), strict=True):
        to.copy_(some.to(factor.dtype) * factor)
    return out


@torch.library.impl(library, "linear_row_loss", "CompositeExplicitAutograd")
def _linear_row_loss(*args: Any) -> tuple[Tensor, ...]:
    given, (extras,) = record(*args)
    return tuple(row_loss(given, extras))


@torch.library.impl(library, "linear_row_grad", "CompositeExplicitAutograd")
def _linear_row_grad(*args: Any) -> tuple[Tensor, ...]:
    given, (stats, upstream, needs) = record(*args)
    return tuple(_by(given, needs).row_grads(given, stats, upstream, needs))


def _by(given: LinearRows, needs: list[bool]) -> Any:
    """The module whose gradients have memory enough."""
    return blocks if blocks.needed(given, needs) else grads


def fake_grads(given: LinearRows, needs: list[bool]) -> list[Tensor]:
    """As those of a head, without numbers."""
    new, dtype = given.head.hidden.new_empty, given.rows.compute_dtype
    dtypes = given.head.hidden.dtype, given.head.weight.dtype if blocks.needed(given, needs) else dtype, dtype
    return [new(s, dtype=d) for s, d in zip(given.head.grad_shapes(needs), dtypes, strict=True)]


@torch.library.register_fake("fastloss::linear_loss", lib=library)
def _(*args: Any) -> tuple[Tensor, ...]:
    given, (_, _, needs, *_) = record(*args)
    new, dtype = given.head.hidden.new_empty, given.rows.compute_dtype
    return new((), dtype=dtype), *fake_grads(given, needs), new((), dtype=dtype)


@torch.library.register_fake("fastloss::linear_loss_grad", lib=library)
def _(*args: Any) -> tuple[Tensor, ...]:
    given, (*_, made, _) = record(*args)
    dtypes = [made[-1].dtype if t is None else t.dtype for t in given.head]
    return tuple(torch.empty_like(g, dtype=d) for g, d in zip(made, dtypes, strict=False))


@torch.library.register_fake("fastloss::linear_row_loss", lib=library)
def _(*args: Any) -> tuple[Tensor, ...]:
    given, (extras,) = record(*args)
    rows, new, F = given.rows, given.head.hidden.new_empty, given.rows.compute_dtype
    N, K = rows.input.shape[0], rows.target.shape[1] if rows.probs is not None else 0
    return new(N, dtype=F), new((5, N), dtype=F), new(N if extras else 0, dtype=torch.int64), new((N, K), dtype=F)


@torch.library.register_fake("fastloss::linear_row_grad", lib=library)
def _(*args: Any) -> tuple[Tensor, ...]:
    given, (_, _, needs) = record(*args)
    return tuple(fake_grads(given, needs))


def needs_of(head: Head) -> list[bool]:
    """Which of hidden states, weight and bias want a gradient: products for the others are not made."""
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in head]


def as_inputs(grads: Any, given: LinearRows) -> list[Tensor | None]:
    """Sums in the compute dtype as gradients of what is differentiated."""
    return [None if t is None else g.to(t.dtype) for g, t in zip(grads, given.head, strict=True)]


def _formula_grads(
    outputs: Callable[[Rows], Any],
    given: LinearRows,
    needs: list[bool],
    upstream: list[Any],
    factors: Sequence[Tensor | None],
) -> Any:
    """The gradients as a differentiable function, by way of all logits (create_graph=True). Of aliases: hidden states
    may be made from the very weight (tied embeddings), and what reaches it through them is autograd's to add. Rows
    whose `factors` (N,) are zero have no effect."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        given = given._replace(head=Head(*(None if t is None else t.view_as(t) for t in given.head)))  # type: ignore[arg-type]
        made = outputs(given.materialised(*factors))
        pairs = [(y, g.to(y.dtype)) for y, g in zip(made, upstream, strict=False) if g is not None]
        ys, gs = zip(*pairs, strict=True)
        inputs = [t for t, needed in zip(given.head, needs, strict=True) if needed and t is not None]
        grads = iter(torch.autograd.grad(ys, inputs, gs, create_graph=create_graph))
    return [next(grads) if needed else None for needed in needs]


def save(ctx: Any, args: Any, *more: Tensor) -> None:
    """The arguments, of which the tensors must go through autograd's hands."""
    ctx.others = [None if isinstance(a, Tensor) else a for a in args]
    ctx.tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    store(ctx, *(args[i] for i in ctx.tensors), *more)


def saved(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    args, saved = list(ctx.others), restore(ctx)
    for i, tensor in zip(ctx.tensors, saved[: len(ctx.tensors)], strict=True):  # torch 2.9 compiles no other zip
        args[i] = tensor
    return args, saved[len(ctx.tensors) :]


class Reduced(torch.autograd.Function):
    """(*arguments of linear_loss) -> loss ()."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        loss, *made = torch.ops.fastloss.linear_loss(*args)
        # Eager: not saved but held, to be given away. A compiled graph is run anew for every backward.
        ctx.made, traced = (None, made) if torch.compiler.is_compiling() else (made, [])
        save(ctx, args, *traced)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        args, traced = saved(ctx)
        nothing = [None] * (len(args) - 3)
        given, reduction = record(*args)
        if not torch.compiler.is_compiling() and needs_formula(upstream):
            token_weight, normalizer, needs = reduction
            to = Reduction("sum", token_weight, normalizer, given.rows.compute_dtype)
            outputs = lambda rows: [reduce_rows(reference.row_result(rows).loss, rows, to)]  # noqa: E731
            return *_formula_grads(outputs, given, needs, [upstream], [token_weight]), *nothing
        if torch.compiler.is_compiling():
            made = list(traced)
        else:
            # They become the caller's .grad: a second backward makes them anew, from the logits.
            made, ctx.made = ctx.made, None
        if made is None:
            _, *made = torch.ops.fastloss.linear_loss(*args, upstream)
        if eager(upstream):
            found: Any = _for_upstream(given, reduction, made, upstream, True)
        else:  # traced, fake or watched
            found = torch.ops.fastloss.linear_loss_grad(*args, made, upstream)
        return *as_inputs(found, given), *nothing


class PerRow(torch.autograd.Function):
    """(*arguments of linear_row_loss, listed, needs) -> what it returns, statistics as in rows.PerRow; with `listed`
    the log-probabilities (N, K) of the listed classes and the entropy."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        *call, listed, needs = args
        loss, stats, argmax, logits = torch.ops.fastloss.linear_row_loss(*call)
        ctx.listed, ctx.needs, ctx.extras = listed, needs, call[-1]
        save(ctx, call, stats)
        ctx.set_materialize_grads(False)
        if listed:
            rows = record(*call)[0].rows
            log_prob = selected_log_probs(reference.transform(logits, rows.spec), rows, stats)
            return log_prob, entropy_of(stats) if ctx.extras else stats.new_empty(0)
        if not ctx.extras:
            return loss
        ctx.mark_non_differentiable(argmax)
        return loss, stats[0] + stats[1], stats[2].clone(), entropy_of(stats), argmax

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        call, (stats,) = saved(ctx)
        nothing = [None] * (len(call) - 3 + 2)
        given, _ = record(*call)
        if all(g is None for g in upstream):
            return None, None, None, *nothing
        if not torch.compiler.is_compiling() and any(map(needs_formula, upstream)):
            return *_formula_grads(
                _formula(ctx.listed), given, ctx.needs, list(upstream), unbatched(upstream)
            ), *nothing
        four: list[Tensor | None] = [*upstream, None, None, None][:4]
        if ctx.listed:
            entropy = upstream[1] if ctx.extras else None  # else it is empty, and may have a gradient
            rows, stats, four = selected_upstream(given.rows, stats, upstream[0], entropy)
            given = given._replace(rows=rows)
        made = torch.ops.fastloss.linear_row_grad(*flat(given), stats, four, ctx.needs)
        return *as_inputs(made, given), *nothing


def _formula(listed: bool) -> Callable[[Rows], Any]:
    if listed:
        return reference.selected
    return reference.row_result
