"""Parts of a vocabulary: rows of one as the backends know them, and what several parts say of the whole.

With lse_r the log-partition of part r, P_r = exp(lse_r - lse), Q_r likewise of the target, and T_r the weight that the
target has in the part:

    cross-entropy   sum_r  loss_r + T_r (lse - lse_r)
    entropy         sum_r  P_r (H_r + (lse - lse_r))
    KL(q || p)      sum_r  Q_r (KL_r + (lse - lse_r) - (lse_u - lse_ur));   KL(p || q) likewise, by P_r

A part's loss is that of its own classes: the kernels know of no others. Nor do they, for the gradient, but for the
statistics that they are given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.reference import ROUNDING, transform
from ..reduction import valid_rows
from ..spec import COMPUTE_DTYPE, Objective, Rows
from ..strides import count_rows

_NONE = -1  # no class of any part


class Part(NamedTuple):
    """Classes [start, stop) of vocab_size. Of rows over it all that has classes is the part's own, but class indices
    count from the first class of all."""

    start: int
    stop: int
    vocab_size: int

    @property
    def size(self) -> int:
        """How many classes."""
        return self.stop - self.start


class PartLoss(NamedTuple):
    """What kernels say of a part: losses (N,), statistics (5, N); with extras the argmax (N,) and its logit; with picks
    the logits (N, K) of the classes listed."""

    loss: Tensor
    stats: Tensor
    argmax: Tensor
    top: Tensor
    logits: Tensor


Compute = Callable[[Rows, bool, bool, "Tensor | None"], PartLoss]  # (rows_of a part, extras, picks, whole statistics)
Fields = dict[str, Tensor]


def rows_of(rows: Rows, part: Part) -> Rows:
    """As a backend takes them. A class index becomes a list of one class: a row whose target is in another part is not
    ignored, it lists a class of no probability."""
    spec = rows.spec
    # A part's kernel divides the smoothing by the part's number of classes.
    eps = spec.label_smoothing * part.size / max(part.vocab_size, 1)
    sharp = (1 - spec.label_smoothing) / (1 - eps) if eps < 1 else 0.0
    spec = spec._replace(label_smoothing=eps)
    if not spec.objective.indexed:
        soft = spec.objective == Objective.PROBS and sharp != 1
        return rows._replace(target=rows.target * sharp if soft else rows.target, spec=spec)
    objective = Objective.TOPK if spec.objective == Objective.INDEX else spec.objective
    y, here, ignored = placed(rows, part)
    F = COMPUTE_DTYPE[rows.input.dtype]
    q = torch.ones_like(y, dtype=F) if rows.probs is None else rows.probs.to(F)
    q = torch.where(here, q if sharp == 1 else q * sharp, 0)
    y = torch.where(here, y - part.start, _stand_in(rows, y - part.start, here))
    y = torch.where(ignored, _NONE, y) if part.size else torch.full_like(y, _NONE)
    return Rows(rows.input, y, rows.weight, spec._replace(ignore_index=_NONE, objective=objective), q)


def _stand_in(rows: Rows, y: Tensor, here: Tensor) -> Tensor | int:
    """A class of this part for those listed elsewhere: any, but of a tail, which is what is not listed, one that is
    listed here; the first class of all where none is."""
    if rows.spec.objective != Objective.TOPK_TAIL or not y.shape[1]:
        return 0
    first = y.gather(1, here.to(torch.int8).argmax(1, keepdim=True))
    return torch.where(here.any(1, keepdim=True), first, 0)


def placed(rows: Rows, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """The listed classes (N, K), which of them are in the part, and which are ignored."""
    y = rows.target if rows.target.dim() == 2 else rows.target[:, None]
    ignored = y == rows.spec.ignore_index
    return y, ~ignored & (y >= part.start) & (y < part.stop), ignored


def _nothing(rows: Rows) -> PartLoss:
    """Of a part without classes."""
    N, K = count_rows(rows.input), 0 if rows.probs is None else rows.probs.shape[1]
    logits = rows.input.new_full((N, K + 1), -torch.inf, dtype=COMPUTE_DTYPE[rows.input.dtype])
    none, zero = logits[:, K], torch.zeros_like(logits[:, K])
    return PartLoss(zero, torch.stack([none, zero, none, zero, none]), zero, none, logits[:, :K])


# ---- what a part contributes ----------------------------------------------------------------------------------------


def contribution(rows: Rows, local: Rows, part: Part, compute: Compute, extras: bool, picks: bool) -> Fields:
    """What a part says of its rows, of which `local` are rows_of them: each (N,), to be gathered from all for `merged`;
    with extras entropy and argmax, with picks the transformed logits of the classes listed."""
    objective, q = rows.spec.objective, local.probs
    # A mixture's first round is that of any divergence.
    of_part = Objective.FORWARD_KL if objective == Objective.JS else local.spec.objective
    local = local._replace(spec=local.spec._replace(objective=of_part, z_loss=0.0))
    if objective == Objective.TOPK_TAIL and q is not None:
        local, picks = local._replace(probs=torch.zeros_like(q)), True
    loss, stats, argmax, top, logits = compute(local, extras, picks, None) if part.size else _nothing(local)
    if objective.paired:
        return dict(zip(("centre", "log_sum", "target_centre", "target_log_sum"), stats, strict=False), loss=loss)
    if objective == Objective.TOPK_TAIL and q is not None:
        return _with_tail(stats, q, transform(logits, rows.spec), placed(rows, part)[1])
    fields = {"centre": stats[0], "log_sum": stats[1], "mass": stats[3], "loss": loss}
    if objective == Objective.INDEX and rows.weight is not None:
        fields["target_weight"] = _weight_of_target(rows, part)
    if extras:
        fields |= {"entropy": stats[4], "top": top.to(loss.dtype), "argmax": argmax.to(loss.dtype) + part.start}
    if picks:
        z = torch.where(placed(rows, part)[1], transform(logits, rows.spec).to(loss.dtype), 0)
        fields |= {f"picked{k}": column for k, column in enumerate(z.unbind(1))}
    return fields


def _with_tail(stats: Tensor, q: Tensor, z: Tensor, here: Tensor) -> Fields:
    """The kernels' statistics of a tail are its centre, log-sum and log-probability, and the log-sum and centre of all;
    the classes that are listed, of probabilities q and transformed logits z, are only left out of it. Where none is
    here, the kernel has left one out that is not listed."""
    tail, log_sum, log_prob, all_log_sum, centre = stats
    empty, zero = log_prob == -torch.inf, torch.zeros_like(tail)
    loss = times(q, (centre[:, None] - z) + all_log_sum[:, None]).sum(1)
    of_tail = Log(torch.where(empty, -torch.inf, tail), torch.where(empty, 0, log_sum))
    if z.shape[1]:
        missing = torch.where(here.any(1), -torch.inf, z[:, 0])
        of_tail, _ = total(Log(*(torch.stack(pair) for pair in zip(of_tail, (missing, zero), strict=True))))
    return {
        "centre": centre,
        "log_sum": all_log_sum,
        "mass": q.sum(1),
        "loss": loss,
        "tail_centre": of_tail.centre,
        "tail_log_sum": of_tail.log_sum,
    }


def _weight_of_target(rows: Rows, part: Part) -> Tensor:
    y, here, _ = placed(rows, part)
    if part.size == 0 or rows.weight is None:
        return torch.zeros_like(y[:, 0], dtype=COMPUTE_DTYPE[rows.input.dtype])
    weight = rows.weight.to(COMPUTE_DTYPE[rows.input.dtype])
    return torch.where(here, weight[torch.where(here, y - part.start, 0)], 0)[:, 0]


# ---- what parts say together ----------------------------------------------------------------------------------------


class Log(NamedTuple):
    """The logarithm of a sum as kernels keep it, centre + log_sum, so that it has its digits at 1e4; -inf + 0 of
    nothing."""

    centre: Tensor
    log_sum: Tensor

    def less(self, other: Log) -> Tensor:
        """The logarithm of the quotient."""
        return (self.centre - other.centre) + (self.log_sum - other.log_sum)


def total(parts: Log) -> tuple[Log, Tensor]:
    """Of parts (R, N): their sum's (N,), and by how much it exceeds each part's, (R, N)."""
    nothing = parts.centre == -torch.inf
    M = parts.centre.amax(0)
    a = torch.where(nothing, -torch.inf, (parts.centre - M) + parts.log_sum)
    top = a.amax(0).clamp(min=torch.finfo(a.dtype).min)
    e = torch.exp(a - top)
    whole = Log(M, top + e.sum(0).log())
    # Of a part that has nearly all, the others say more than a difference of what is nearly equal.
    zero = torch.zeros_like(e[:1])
    before, after = torch.cat([zero, e[:-1].cumsum(0)]), torch.cat([e[1:].flip(0).cumsum(0).flip(0), zero])
    others = (before + after) / e
    return whole, torch.where(others < 0.5, others.log1p(), torch.where(nothing, torch.inf, whole.less(parts)))


def times(weight: Tensor, value: Tensor) -> Tensor:
    """Where 0 times anything is 0."""
    return torch.where(weight == 0, 0, weight * value)


class Whole(NamedTuple):
    """Rows over all parts: `loss` (N,), and `stats` (5, N), from which each part's kernel makes its gradient; with
    extras their entropy is there, and the argmax; with picks the logits (N, K) listed. Of a lumped tail its logarithm
    and weight, of class indices the class weights (N,)."""

    loss: Tensor
    stats: Tensor
    tail: Log | None = None
    rest: Tensor | None = None
    target_weight: Tensor | None = None
    argmax: Tensor | None = None
    picked: Tensor | None = None

    @property
    def lse(self) -> Tensor:
        """The log-partition (N,)."""
        return self.stats[0] + self.stats[1]

    def kept(self) -> list[Tensor]:
        """What the gradient needs, for `kept_of`."""
        return [self.stats] if self.tail is None or self.rest is None else [self.stats, *self.tail, self.rest]

    def at(self, where: slice | Tensor) -> Whole:
        """Some rows, as their gradient needs them."""
        tail = None if self.tail is None else Log(*(t[where] for t in self.tail))
        rest = None if self.rest is None else self.rest[where]
        return Whole(self.loss[where], self.stats[:, where].contiguous(), tail, rest)


def merged(rows: Rows, parts: Fields) -> Whole:
    """From what all parts say, (R, N) each."""
    objective = rows.spec.objective
    merge = _divergence if objective.paired else _tailed if objective == Objective.TOPK_TAIL else _cross_entropy
    whole = merge(rows, parts)
    return whole if objective == Objective.JS else with_z_loss(rows, whole)  # whose loss is the second round's


def kept_of(stats: Tensor, *tail: Tensor) -> Whole:
    """Whole rows, as their gradient needs them."""
    return Whole(stats[0], stats, Log(*tail[:2]), tail[2]) if tail else Whole(stats[0], stats)


def with_z_loss(rows: Rows, whole: Whole) -> Whole:
    """Of the rows that count."""
    if not rows.spec.z_loss:
        return whole
    z_loss, valid = rows.spec.z_loss * whole.lse**2, valid_rows(rows)
    return whole._replace(loss=whole.loss + (z_loss if valid is None else torch.where(valid, z_loss, 0)))


def _summed(parts: Fields, lse: Log, gap: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy and the target's weight; NaN where there is no class at all, as a softmax has it."""
    mass, nothing = parts["mass"].sum(0), parts["centre"] == -torch.inf
    loss = torch.where(nothing, 0, parts["loss"]) + times(parts["mass"], gap)
    return loss.sum(0) + times(mass, lse.centre - lse.centre), mass


def _cross_entropy(rows: Rows, parts: Fields) -> Whole:
    lse, gap = total(Log(parts["centre"], parts["log_sum"]))
    loss, mass = _summed(parts, lse, gap)
    zero = torch.zeros_like(mass)
    entropy, argmax = zero, None
    if "entropy" in parts:
        entropy = times(torch.exp(-gap), parts["entropy"] + gap).sum(0)
        largest = parts["top"] == parts["top"].amax(0)
        argmax = torch.where(largest, parts["argmax"], torch.inf).amin(0).nan_to_num(posinf=0).long()
    weight = parts["target_weight"].sum(0) if "target_weight" in parts else None
    picked = [column.sum(0) for name, column in parts.items() if name.startswith("picked")]
    stats = torch.stack([*lse, zero, mass, entropy])
    return Whole(loss, stats, None, None, weight, argmax, torch.stack(picked, 1) if picked else None)


def _tailed(rows: Rows, parts: Fields) -> Whole:
    lse, gap = total(Log(parts["centre"], parts["log_sum"]))
    tail, _ = total(Log(parts["tail_centre"], parts["tail_log_sum"]))
    loss, mass = _summed(parts, lse, gap)
    rest = rest_of(mass, tail)
    valid = valid_rows(rows)
    rest = rest if valid is None else torch.where(valid, rest, 0)
    loss = loss + times(rest, lse.less(tail).clamp(min=0))
    zero = torch.zeros_like(mass)
    return Whole(loss, torch.stack([*lse, zero, mass, zero]), tail, rest)


def rest_of(mass: Tensor, tail: Log) -> Tensor:
    """The target's weight of the tail; what may be rounding is none of a tail without classes."""
    rest = (1 - mass).clamp(min=0)
    return torch.where((tail.centre == -torch.inf) & (rest < ROUNDING), 0, rest)


def _divergence(rows: Rows, parts: Fields) -> Whole:
    lse, gap = total(Log(parts["centre"], parts["log_sum"]))
    target_lse, target_gap = total(Log(parts["target_centre"], parts["target_log_sum"]))
    own, other = (gap, target_gap) if rows.spec.objective == Objective.REVERSE_KL else (target_gap, gap)
    inside = torch.where(other == torch.inf, torch.inf, parts["loss"] + other - own)
    loss = times(torch.exp(-own), inside).sum(0)
    tilt = (loss + lse.log_sum) - target_lse.log_sum  # of the reverse KL; others' gradients need none
    return Whole(loss, torch.stack([*lse, *target_lse, tilt]))


# ---- gradients ------------------------------------------------------------------------------------------------------


# (rows of a part, statistics of the whole, upstream gradients (N,) of (loss, lse, log_prob, entropy)) -> their gradient
RowGrad = Callable[[Rows, Tensor, "list[Tensor | None]"], Tensor]


def tail_gradient(rows: Rows, local: Rows, part: Part, whole: Whole, g: Tensor, row_grad: RowGrad) -> Tensor:
    """Of a part's logits, where the classes that are not listed are lumped together: A p_j - q_j of what is listed,
    A p_j - rest p_j / P(tail) of the others. The kernel writes the latter, relative to the tail, as a cross-entropy of
    no class; what is listed is put over it."""
    assert whole.tail is not None and whole.rest is not None and local.probs is not None
    lse, spec = Log(whole.stats[0], whole.stats[1]), rows.spec
    A = whole.stats[3] + whole.rest + 2 * spec.z_loss * (lse.centre + lse.log_sum)
    of_tail = times(A, torch.exp(whole.tail.less(lse))) - whole.rest
    q, here = local.probs, placed(rows, part)[1]
    y = torch.where(here, local.target, 0)
    z = transform(local.logits_of(y), spec)  # before the gradient overwrites them
    of_none = local._replace(probs=torch.zeros_like(q), spec=local.spec._replace(objective=Objective.TOPK, z_loss=0.0))
    zero = torch.zeros_like(of_tail)
    centre = torch.where(whole.tail.centre == -torch.inf, 0, whole.tail.centre)
    grad = row_grad(of_none, torch.stack([centre, whole.tail.log_sum, zero, of_tail, zero]), [g, None, None, None])
    p = torch.exp((z - lse.centre[:, None]) - lse.log_sum[:, None])
    together = torch.zeros_like(q)
    for k in range(q.shape[1]):  # a class listed twice has the sum of its probabilities
        together += torch.where(here & (y == y[:, k : k + 1]) & here[:, k : k + 1], q[:, k : k + 1], 0)
    dz = (g * spec.logit_scale)[:, None] * (times(A[:, None], p) - together)
    if spec.softcap:
        dz = dz * (1 - (z / spec.softcap) ** 2)
    dz = torch.where((g == 0)[:, None], 0, dz).to(grad.dtype)
    # Where an entry is elsewhere, one that is here is written again; where none is, what stands there.
    first = here.to(torch.int8).argmax(1, keepdim=True)
    some = here.any(1, keepdim=True)
    y = torch.where(here, y, y.gather(1, first))
    dz = torch.where(here, dz, torch.where(some, dz.gather(1, first), grad[..., :1].reshape(-1, 1)))
    listed = *grad.shape[:-1], y.shape[1]
    return grad.scatter_(-1, y.reshape(listed), dz.reshape(listed))
