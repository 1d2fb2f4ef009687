"""Rows of which each rank has some classes: the autograd Function over logits and, for those and hidden states alike,
how what it returns becomes losses. As fastloss/rows.py for rows of one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reduction import reduce_rows
from ..rows import RowLoss, call_row_grad, call_row_loss, needs_formula, transforming
from ..spec import Objective, Reduction, Rows, Spec
from . import merge
from .merge import Compute, Log, Part, PartLoss, Whole
from .shard import VocabShard, check_agreement, check_padding, check_targets, gather

# (rows of a part as a backend takes them, statistics of the whole, upstream of (loss, lse, log_prob, entropy), out)
RowGrad = Callable[[Rows, Tensor, "list[Tensor | None]"], Tensor]


class Asked(NamedTuple):
    """What is wanted of rows beside their losses: entropy and argmax; the logits of the classes that targets list."""

    extras: bool = False
    picks: bool = False


PLAIN = Asked()


class Outcome(NamedTuple):
    """What a Function returns of rows over all ranks, differentiable but for centre, target_weight and argmax. The
    log-partition is centre + log_sum. What was not asked for is empty."""

    loss: Tensor
    log_sum: Tensor
    entropy: Tensor
    picked: Tensor
    centre: Tensor
    target_weight: Tensor
    argmax: Tensor


def over_ranks(rows: Rows, shard: VocabShard, compute: Compute, asked: Asked) -> Whole:
    """Losses and statistics of whole rows from each rank's part: one collective, two of a mixture (JS)."""
    part = shard.part
    whole = merge.merged(rows, gather(merge.contribution(rows, part, compute, *asked), shard))
    if rows.spec.objective != Objective.JS:
        return whole
    loss = tilt = torch.zeros_like(whole.loss)
    if part.size:
        local = merge.rows_of(rows._replace(spec=rows.spec._replace(z_loss=0.0)), part)
        loss, stats, *_ = compute(local, False, False, whole.stats)
        tilt = stats[4]
    sums = {name: parts.sum(0) for name, parts in gather({"loss": loss, "tilt": tilt}, shard).items()}
    z_loss = rows.spec.z_loss * (whole.stats[0] + whole.stats[1]) ** 2
    return Whole(sums["loss"] + z_loss, torch.stack([*whole.stats[:4], sums["tilt"]]))


def save(ctx: Any, whole: Whole, *tensors: Tensor | None) -> None:
    """What the backward of a Function needs of whole rows, after what it needs besides."""
    tail = () if whole.tail is None or whole.rest is None else (*whole.tail, whole.rest)
    ctx.save_for_backward(*tensors, whole.stats, *tail)
    ctx.set_materialize_grads(False)


def saved(ctx: Any, count: int) -> tuple[list[Any], Whole]:
    """The tensors, of which there are `count`, and the whole rows."""
    tensors = ctx.saved_tensors
    stats, *tail = tensors[count:]
    whole = Whole(stats[0], stats, Log(*tail[:2]), tail[2]) if tail else Whole(stats[0], stats)
    return list(tensors[:count]), whole


def outcome(ctx: Any, whole: Whole) -> Outcome:
    """What a Function returns."""
    given = whole.target_weight, whole.argmax, whole.picked
    weight, argmax, picked = (whole.loss.new_empty(0) if t is None else t for t in given)
    centre, log_sum, _, _, entropy = (t.clone() for t in whole.stats)
    ctx.mark_non_differentiable(centre, weight, argmax)
    return Outcome(whole.loss, log_sum, entropy, picked, centre, weight, argmax)


def gradients(
    rows: Rows,
    part: Part,
    whole: Whole,
    upstream: tuple[Tensor | None, ...],
    row_grad: RowGrad,
    listed: Callable[[Tensor], Tensor],
) -> Tensor:
    """Of a part's logits, from upstream gradients of an Outcome's first four."""
    loss, lse, entropy, picked = upstream[:4]
    if picked is None or not picked.numel():
        return merge.gradient(rows, part, whole, [loss, lse, None, entropy], row_grad, listed)
    # That of listed logits is a cross-entropy's that lists them, of negative probabilities and no weight in all.
    spec = rows.spec._replace(objective=Objective.TOPK, z_loss=0.0, label_smoothing=0.0)
    target = rows.target if rows.target.dim() == 2 else rows.target[:, None]
    chosen = Rows(rows.input, target, None, spec, -picked)
    one, zero = torch.ones_like(whole.loss), torch.zeros_like(whole.loss)
    stats = torch.stack([*whole.stats[:2], zero, zero, whole.stats[4]])
    if loss is None:
        return row_grad(merge.rows_of(chosen, part), stats, [one, lse, None, entropy])
    before = rows.input.clone()  # the gradient may be written over it
    grad = merge.gradient(rows, part, whole, [loss, lse, None, entropy], row_grad, listed)
    more = call_row_grad(merge.rows_of(chosen._replace(input=before), part), stats, [one, None, None, None])
    return grad.add_(more)


class Sharded(torch.autograd.Function):
    """(input, rest of the rows, shard, asked, inplace) -> Outcome."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        spec: Spec,
        probs: Tensor | None,
        shard: VocabShard,
        asked: Asked,
        inplace: bool,
    ) -> Any:
        rows = Rows(input[:, : shard.part.size], target, weight, spec, probs)
        whole = over_ranks(rows, shard, _compute, asked)
        save(ctx, whole, input, target, weight, probs)
        ctx.spec, ctx.part, ctx.inplace = spec, shard.part, inplace
        return tuple(outcome(ctx, whole))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        refuse_formula(*upstream)
        (input, target, weight, probs), whole = saved(ctx, 4)
        size = ctx.part.size
        grad = input.detach() if ctx.inplace else torch.empty_like(input)
        if size:
            rows = Rows(input[:, :size].detach(), target, weight, ctx.spec, probs)
            row_grad = lambda local, stats, g: call_row_grad(local, stats, g, grad[:, :size])  # noqa: E731
            gradients(rows, ctx.part, whole, upstream, row_grad, lambda index: rows.input.gather(1, index))
        grad[:, size:] = 0
        if ctx.inplace:
            torch.autograd.graph.increment_version(input)
        return grad, *([None] * 7)


def _compute(local: Rows, extras: bool, picks: bool, whole: Tensor | None) -> PartLoss:
    loss, stats, argmax, _ = call_row_loss(local, extras, whole)
    top = local.input.gather(1, argmax[:, None])[:, 0] if extras else loss
    logits = local.input.gather(1, local.target.clamp(min=0)) if picks else loss[:, None]
    return PartLoss(loss, stats, argmax, top, logits)


def refuse_formula(*upstream: Tensor | None) -> None:
    """There is no double backward, and no transform, through ranks."""
    if not torch.compiler.is_compiling() and any(map(needs_formula, upstream)):
        raise NotImplementedError(
            "shard: a loss over several ranks' classes is differentiated once, by autograd alone: expected "
            "create_graph=False and no transform of torch.func"
        )


def check(rows: Rows, shard: VocabShard, asked: Asked, *vectors: Tensor | None) -> None:
    """Before anything is computed or said to other ranks."""
    if not isinstance(shard, VocabShard):
        raise TypeError(f"shard: expected a fastloss.VocabShard or None, got {type(shard).__name__}")
    check_padding(rows.input.shape[1], shard)
    if rows.spec.objective.indexed:
        check_targets(rows.target, rows.spec.ignore_index, shard.vocab_size)
    constant = {"target": rows.target, "weight": rows.weight, "probs": rows.probs}
    for name, t in constant.items():
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{name}: expected no gradient to be wanted of it with shard")
    if transforming():
        refuse_formula(rows.input)
    check_agreement(rows, shard, asked)


def of_part(rows: Rows, shard: VocabShard) -> Rows:
    """Without the padding of all but the logits."""
    size = shard.part.size
    dense = not rows.spec.objective.indexed
    weight = None if rows.weight is None else rows.weight[:size]
    return rows._replace(target=rows.target[:, :size] if dense else rows.target, weight=weight)


def apply(rows: Rows, shard: VocabShard, asked: Asked = PLAIN, inplace: bool = False) -> Outcome:
    """Rows of logits."""
    check(rows, shard, asked)
    return Outcome(*Sharded.apply(*of_part(rows, shard), shard, asked, inplace))


def reduced(found: Outcome, rows: Rows, to: Reduction) -> Tensor:
    """The loss as `to` says, in its dtype; (N,) unreduced."""
    return reduce_rows(found.loss, rows, to, weights_of(found)).to(to.dtype)


def weights_of(found: Outcome) -> Tensor | None:
    """The class weights of targets, if there are any."""
    return found.target_weight if found.target_weight.numel() else None


def selected(rows: Rows, shard: VocabShard, extras: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, K) of the classes listed and, with `extras`, the entropy (N,)."""
    found = apply(rows, shard, Asked(extras, True))
    return log_probs(found, rows), found.entropy


def row_loss(found: Outcome, rows: Rows, extras: bool) -> RowLoss:
    """The fields of RowLoss; there is no rank among classes of which each rank sees some."""
    if not extras:
        return RowLoss(found.loss, target_weight=weights_of(found))
    lse = found.centre + found.log_sum
    if rows.spec.objective == Objective.INDEX:
        log_prob = log_probs(found, rows)[:, 0]
    else:
        log_prob = rows.spec.z_loss * lse**2 - found.loss
    return RowLoss(found.loss, lse, log_prob, found.entropy, found.argmax, None, weights_of(found))


def log_probs(found: Outcome, rows: Rows) -> Tensor:
    """Of the classes listed, (N, K); 0 where ignored."""
    valid = rows.target != rows.spec.ignore_index
    log_prob = ((found.picked - found.centre[:, None]) - found.log_sum[:, None]).clamp(max=0)
    return torch.where(valid if valid.dim() == 2 else valid[:, None], log_prob, 0)
