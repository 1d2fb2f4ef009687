"""Rows of which each rank has some classes: the autograd Function over logits and, for those and hidden states alike,
how what it returns becomes losses. As fastloss/rows.py for rows of one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_indices
from ..backends import choose_for, native
from ..reduction import reduce_rows, valid_rows
from ..rows import RowLoss, call_row_grad, call_row_loss, entropy_of, needs_formula, transforming
from ..saved import save as store
from ..saved import saved as restore
from ..spec import Objective, Reduction, Rows
from . import merge
from .merge import Compute, Part, PartLoss, RowGrad, Whole, kept_of, placed, rows_of, tail_gradient
from .shard import VocabShard, check_padding, gather


class Asked(NamedTuple):
    """What is wanted of rows beside their losses: entropy and argmax; the logits of the classes that targets list."""

    extras: bool = False
    picks: bool = False


PLAIN = Asked()


def statistics(rows: Rows, extras: bool) -> Asked:
    """What the fields of RowLoss are made of: the log-probability of a class index from its logit."""
    return Asked(extras, extras and rows.spec.objective == Objective.INDEX)


class Outcome(NamedTuple):
    """What a Function returns of rows over all ranks, differentiable but for centre, target_weight and argmax. The
    log-partition is centre + log_sum. None where it was not asked for."""

    loss: Tensor
    log_sum: Tensor | None
    entropy: Tensor | None
    picked: Tensor | None
    centre: Tensor | None
    target_weight: Tensor | None
    argmax: Tensor | None


def over_ranks(rows: Rows, local: Rows, shard: VocabShard, compute: Compute, asked: Asked) -> Whole:
    """Losses and statistics of whole rows from each rank's part: one collective, two of a mixture (JS)."""
    whole = merge.merged(rows, gather(merge.contribution(rows, local, shard.part, compute, *asked), rows, shard, asked))
    if rows.spec.objective != Objective.JS:
        return whole
    loss = tilt = torch.zeros_like(whole.loss)
    if shard.part.size:
        local = local._replace(spec=local.spec._replace(z_loss=0.0))
        loss, stats, *_ = compute(local, False, False, whole.stats)
        tilt = stats[4]
    sums = {name: parts.sum(0) for name, parts in gather({"loss": loss, "tilt": tilt}, rows, shard, asked).items()}
    return merge.with_z_loss(rows, Whole(sums["loss"], torch.stack([*whole.stats[:4], sums["tilt"]])))


def save(ctx: Any, rows: Rows, local: Rows, whole: Whole, *tensors: Tensor | None) -> None:
    """What the backward of a Function needs of rows: after what it needs besides, which are `tensors`."""
    target = None if local.target is rows.target else local.target
    store(ctx, *tensors, rows.target, rows.weight, rows.probs, target, local.probs, *whole.kept())
    ctx.specs = rows.spec, local.spec
    ctx.set_materialize_grads(False)


def saved(ctx: Any, count: int) -> tuple[list[Any], Callable[[Tensor], tuple[Rows, Rows]], Whole]:
    """The `count` other tensors, what makes (rows, local) of logits, and the whole rows."""
    tensors = restore(ctx)
    target, weight, probs, local_target, local_probs, *kept = tensors[count:]
    spec, local_spec = ctx.specs

    def rows_over(input: Tensor) -> tuple[Rows, Rows]:
        rows = Rows(input, target, weight, spec, probs)
        return rows, Rows(input, target if local_target is None else local_target, weight, local_spec, local_probs)

    return list(tensors[:count]), rows_over, kept_of(*kept)


def outcome(ctx: Any, whole: Whole, asked: Asked) -> Outcome:
    """What a Function returns."""
    some = asked.extras or asked.picks
    centre, log_sum = (whole.stats[0].clone(), whole.stats[1].clone()) if some else (None, None)
    entropy = entropy_of(whole.stats) if asked.extras else None
    constant = centre, whole.target_weight, whole.argmax
    ctx.mark_non_differentiable(*(t for t in constant if t is not None))
    return Outcome(whole.loss, log_sum, entropy, whole.picked, *constant)


def gradients(
    rows: Rows, local: Rows, part: Part, whole: Whole, upstream: tuple[Tensor | None, ...], row_grad: RowGrad
) -> Tensor:
    """Of a part's logits, from upstream gradients of an Outcome's first four."""
    loss, lse, entropy, picked = upstream[:4]
    if picked is None:
        if rows.spec.objective == Objective.TOPK_TAIL and loss is not None:
            return tail_gradient(rows, local, part, whole, loss, row_grad)
        return row_grad(local, whole.stats, [loss, lse, None, entropy])
    # That of listed logits is a cross-entropy's that lists them, of negative probabilities and no weight in all.
    spec = local.spec._replace(z_loss=0.0, label_smoothing=0.0)
    probs = torch.where(placed(rows, part)[1], -picked, 0)
    chosen = Rows(local.input, local.target, None, spec, probs)
    # A row of which nothing is wanted must have no upstream gradient.
    one, zero = (probs != 0).any(1).to(whole.loss.dtype), torch.zeros_like(whole.loss)
    stats = torch.stack([*whole.stats[:2], zero, zero, whole.stats[4]])
    if loss is None:
        return row_grad(chosen, stats, [one, lse, None, entropy])
    more = call_row_grad(chosen, stats, [one, None, None, None])
    return row_grad(local, whole.stats, [loss, lse, None, entropy]).add_(more)


class Sharded(torch.autograd.Function):
    """(input, rest of the rows, shard, asked, inplace) -> Outcome."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, *args: Any) -> Any:
        *fields, shard, asked, inplace = args
        rows = Rows(input[..., : shard.part.size], *fields)
        local = rows_of(rows, shard.part)
        whole = over_ranks(rows, local, shard, _compute, asked)
        save(ctx, rows, local, whole, input)
        ctx.part, ctx.inplace = shard.part, inplace
        return tuple(outcome(ctx, whole, asked))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        refuse_formula(*upstream)
        (input,), rows_over, whole = saved(ctx, 1)
        size, nothing = ctx.part.size, [None] * 7
        rows, local = rows_over(input[..., :size].detach())
        if torch.compiler.is_compiling():  # operators return what they make
            made = gradients(rows, local, ctx.part, whole, upstream, call_row_grad) if size else input[..., :0]
            return torch.nn.functional.pad(made, (0, input.shape[-1] - size)), *nothing

        def write(grad: Tensor) -> None:
            if size:
                row_grad = lambda local, stats, g: call_row_grad(local, stats, g, grad)  # noqa: E731
                gradients(rows, local, ctx.part, whole, upstream, row_grad)

        return written(input, size, ctx.inplace, write), *nothing


def written(input: Tensor, size: int, inplace: bool, write: Callable[[Tensor], None]) -> Tensor:
    """A gradient of logits, of whose classes `write` writes the first `size`; what is beyond is padding."""
    grad = input.detach() if inplace else _empty(input)
    write(grad[..., :size])
    if size < input.shape[-1]:
        grad[..., size:] = 0
    if inplace:
        torch.autograd.graph.increment_version(input)
    return grad


def _empty(input: Tensor) -> Tensor:
    """For a gradient: recycled memory, where CPUs would have to find it page by page."""
    return native.empty_grad(input)[0] if input.device.type == "cpu" else input.new_empty(input.shape)


def _compute(local: Rows, extras: bool, picks: bool, whole: Tensor | None) -> PartLoss:
    loss, stats, argmax, _ = call_row_loss(local, extras, whole)
    top = local.logits_of(argmax[:, None])[:, 0] if extras else loss
    logits = local.logits_of(local.target.clamp(min=0)) if picks else loss[:, None]
    return PartLoss(loss, stats, argmax, top, logits)


def refuse_formula(*upstream: Tensor | None) -> None:
    """There is no double backward, and no transform, through ranks."""
    if not torch.compiler.is_compiling() and any(map(needs_formula, upstream)):
        raise NotImplementedError(
            "shard: a loss over several ranks' classes is differentiated once, by autograd alone: expected "
            "create_graph=False and no transform of torch.func"
        )


def _has_kernels(device: torch.device, dtype: torch.dtype, target_dtype: torch.dtype, number: int) -> bool:
    """Whether the backend of such a part computes parts."""
    return choose_for(device, dtype, target_dtype, Objective(number)).in_parts


# What torch.compiler.assume_constant_result does, but without the import of the compiler: it cannot trace how a backend
# is chosen.
_has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check(rows: Rows, shard: VocabShard) -> None:
    """Before anything is computed or said to other ranks."""
    if not isinstance(shard, VocabShard):
        raise TypeError(f"shard: expected a fastloss.VocabShard or None, got {type(shard).__name__}")
    check_padding(rows.input.shape[-1], shard)
    if rows.spec.objective.indexed:
        check_indices(rows.target, rows.spec.ignore_index, shard.vocab_size)
    constant = {"target": rows.target, "weight": rows.weight, "probs": rows.probs}
    for name, t in constant.items():
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{name}: expected no gradient to be wanted of it with shard")
    if transforming():
        refuse_formula(rows.input)
    objective = Objective.TOPK if rows.spec.objective == Objective.INDEX else rows.spec.objective
    if not _has_kernels(rows.input.device, rows.input.dtype, rows.target.dtype, objective._value_):
        raise NotImplementedError(
            f"shard: expected a backend of kernels, such as those of {rows.input.device.type} tensors usually are, got "
            "the reference"
        )


def of_part(rows: Rows, shard: VocabShard) -> Rows:
    """Without the padding of all but the logits."""
    size = shard.part.size
    dense = not rows.spec.objective.indexed
    weight = None if rows.weight is None else rows.weight[:size]
    return rows._replace(target=rows.target[..., :size] if dense else rows.target, weight=weight)


def apply(rows: Rows, shard: VocabShard, asked: Asked = PLAIN, inplace: bool = False) -> Outcome:
    """Rows of logits."""
    check(rows, shard)
    if not shard.sum_hidden:
        raise ValueError("sum_hidden: expected True with a loss of logits, which has no gradient of hidden states")
    return Outcome(*Sharded.apply(*of_part(rows, shard), shard, asked, inplace))


def reduced(found: Outcome, rows: Rows, to: Reduction) -> Tensor:
    """The loss as `to` says, in its dtype; (N,) unreduced."""
    return reduce_rows(found.loss, rows, to, found.target_weight).to(to.dtype)


def row_loss(found: Outcome, rows: Rows) -> RowLoss:
    """The fields of RowLoss; there is no rank among classes of which each rank sees some. Of ignored rows, which no
    rank reads, what was merged says nothing: their statistics are zero."""
    if found.centre is None or found.log_sum is None:
        return RowLoss(found.loss, target_weight=found.target_weight)
    valid, lse = valid_rows(rows), found.centre + found.log_sum
    if rows.spec.objective == Objective.INDEX:
        log_prob = log_probs(found, rows)[:, 0]
    else:
        log_prob = rows.spec.z_loss * lse**2 - found.loss
    logit = None if found.picked is None else found.picked[:, 0]
    stats = lse, log_prob, found.entropy, found.argmax, None, logit
    if valid is not None:
        stats = tuple(t if t is None else torch.where(valid, t, 0) for t in stats)  # type: ignore[assignment]
    return RowLoss(found.loss, *stats, found.target_weight)


def log_probs(found: Outcome, rows: Rows) -> Tensor:
    """Of the classes listed, (N, K); 0 where ignored."""
    assert found.centre is not None and found.log_sum is not None
    if found.picked is None:  # no class is listed
        return found.loss.new_zeros(rows.target.shape)
    valid = rows.target != rows.spec.ignore_index
    log_prob = ((found.picked - found.centre[:, None]) - found.log_sum[:, None]).clamp(max=0)
    return torch.where(valid if valid.dim() == 2 else valid[:, None], log_prob, 0)


def selected(found: Outcome, rows: Rows) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, K) of the classes listed and, if asked for, the entropy (N,)."""
    entropy, valid = found.loss if found.entropy is None else found.entropy, valid_rows(rows)
    return log_probs(found, rows), entropy if valid is None else torch.where(valid, entropy, 0)
