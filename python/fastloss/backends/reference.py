"""The losses as a textbook writes them, in torch operations that any device runs and autograd differentiates.

It is the last backend in the registry, the path under `torch.func` transforms and double backward, and the file to read
first: the native and GPU kernels compute exactly this.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reduction import rows_that_count, valid_rows
from ..saved import savable
from ..spec import COMPUTE_DTYPE, Objective, Rows, Spec
from ..strides import count_rows

ROUNDING = 1e-5  # what is left of one may be rounding; of a tail without classes it would weigh infinitely


class RowResult(NamedTuple):
    """Per-row loss and statistics, (N,) each, in the compute dtype; all 0 where the target is ignored. `log_prob` is
    its expectation under a target of more than one class."""

    loss: Tensor
    lse: Tensor
    log_prob: Tensor
    entropy: Tensor


def transform(input: Tensor, spec: Spec) -> Tensor:
    """z = phi(x) = softcap(logit_scale x), in the compute dtype."""
    z = input.to(COMPUTE_DTYPE[input.dtype])
    if spec.logit_scale != 1:
        z = z * spec.logit_scale
    if spec.softcap:
        z = spec.softcap * torch.tanh(z / spec.softcap)
    return z


def row_result(rows: Rows) -> RowResult:
    """Loss and statistics of each row."""
    rows, valid = rows.flat(), valid_rows(rows)
    if valid is not None:
        rows = _without(rows, ~valid)
    z = transform(rows.input, rows.spec)
    log_p = torch.log_softmax(z, -1)
    lse = torch.logsumexp(z, -1)
    entropy = -expectation(log_p, log_p)  # never below zero: no logarithm of a softmax is above it
    loss, log_prob = _OBJECTIVES[rows.spec.objective.value](rows, z, log_p)
    if rows.spec.z_loss:
        loss = loss + rows.spec.z_loss * lse**2
    result = RowResult(loss, lse, log_prob, entropy)
    return result if valid is None else RowResult(*(torch.where(valid, value, 0) for value in result))


def _without(rows: Rows, idle: Tensor) -> Rows:
    """Zeros in place of the numbers of idle rows (N,): a NaN there would meet a gradient of zero, and zero times NaN is
    NaN."""

    def emptied(t: Tensor | None) -> Any:
        return t if t is None or not t.is_floating_point() else torch.where(idle[:, None], 0, t)

    return rows._replace(input=emptied(rows.input), target=emptied(rows.target), probs=emptied(rows.probs))


def quiet(rows: Rows, *factors: Tensor | None) -> Rows:
    """The rows, of which those without effect (see rows_that_count) hold no NaN and no infinity. Others keep their
    numbers, also where a factor is zero: a second derivative reads them."""
    counts = rows_that_count(rows, *factors)
    if counts is None:
        return rows
    rows = rows.flat()
    broken = torch.zeros_like(counts)
    for t in (rows.input, rows.target, rows.probs):
        if t is not None and t.is_floating_point():
            t = t.detach()
            broken = broken | ~(t < torch.inf).all(-1) | (t == -torch.inf).all(-1)
    return _without(rows, broken & ~counts)


def expectation(log_q: Tensor, values: Tensor) -> Tensor:
    """sum q values over the classes of q > 0: a masked class (log q = -inf) is taken out before products."""
    nothing = log_q == -torch.inf
    return (log_q.exp() * values.masked_fill(nothing, 0)).sum(-1)


def _dot(w: Tensor, log_p: Tensor) -> Tensor:
    """sum w log p, where 0 * inf is 0."""
    return (w * log_p.masked_fill((log_p == -torch.inf) & (w == 0), 0)).sum(-1)


# ---- (rows, z, log p) to (loss, log-probability of the target), (N,) each --------------------------------------------


def _index(rows: Rows, z: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    spec, target, w = rows.spec, savable(rows.target), _class_weights(rows)
    log_prob = -F.nll_loss(log_p, target, ignore_index=spec.ignore_index, reduction="none")
    valid = target != spec.ignore_index
    sharp = 1 - spec.label_smoothing
    w_y = sharp if w is None else sharp * w[torch.where(valid, target, 0)]
    loss = -w_y * log_prob if w is None and sharp else -torch.where(w_y * valid == 0, 0, w_y * log_prob)
    return _smoothed(loss, w, spec, log_p), log_prob


def _probs(rows: Rows, z: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    log_prob = _dot(smooth_probs(savable(rows.target).to(z.dtype), _class_weights(rows), rows.spec), log_p)
    return -log_prob, log_prob


def _topk(rows: Rows, z: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    w, (indices, q) = _class_weights(rows), listed(rows)
    log_prob = _dot(q if w is None else q * w[indices], log_p.gather(1, indices))
    return _smoothed(-(1 - rows.spec.label_smoothing) * log_prob, w, rows.spec, log_p), log_prob


def _topk_tail(rows: Rows, z: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    indices, q = listed(rows)
    rest = (1 - q.sum(-1)).clamp(min=0)
    V = z.shape[1]
    is_listed = torch.zeros(z.shape[0], V + 1, dtype=torch.bool, device=z.device)
    is_listed = is_listed.scatter(1, torch.where(rows.target == rows.spec.ignore_index, V, indices), True)[:, :V]
    nothing = (is_listed | (z == -torch.inf)).all(-1)
    rest = rest.masked_fill(nothing & (rest < ROUNDING), 0)
    # A row without a tail keeps its logits, and a zero does not meet the infinity of an empty sum.
    tail = torch.logsumexp(z.masked_fill(is_listed & (rest > 0)[:, None], -torch.inf), -1) - torch.logsumexp(z, -1)
    log_prob = _dot(q, log_p.gather(1, indices)) + rest * tail
    return -log_prob, log_prob


def _forward_kl(rows: Rows, z: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    log_q = _target_log_probs(rows)
    return _kl(log_q, log_p), expectation(log_q, log_p)


def _reverse_kl(rows: Rows, z: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    log_q = _target_log_probs(rows)
    return _kl(log_p, log_q), expectation(log_q, log_p)


def _js(rows: Rows, z: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    u, beta = _target_logits(rows), rows.spec.beta
    log_q = torch.log_softmax(u, -1)
    nowhere = (log_q == -torch.inf) & (log_p == -torch.inf)
    parts = log_q.masked_fill(nowhere, 0) + math.log(beta), log_p.masked_fill(nowhere, 0) + math.log1p(-beta)
    log_m = torch.logaddexp(*parts)
    p, q = torch.softmax(z, -1), torch.softmax(u, -1)
    m = beta * q + (1 - beta) * p
    some = m > 1e-30
    x = torch.where(some, q - p, 0) / torch.where(some, m, 1)  # (q - m) / m = (1 - beta) x, (p - m) / m = -beta x
    of_q = beta * q * _log_quotient((1 - beta) * x, some, _finite(log_q) - log_m)
    of_p = (1 - beta) * p * _log_quotient(-beta * x, some, _finite(log_p) - log_m)
    return (of_q + of_p).sum(-1), expectation(log_q, log_p)


def _log_quotient(y: Tensor, some: Tensor, far: Tensor) -> Tensor:
    """log(1 + y); `far`, a difference of logarithms, has lost digits of it where y is little."""
    near = some & (y.abs() < 0.4)
    return torch.where(near, torch.log1p(torch.where(near, y, 0)), far)


# By the number: torch.compile before 2.12 hashes no Objective inside torch.func.grad.
_OBJECTIVES = {
    Objective.INDEX.value: _index,
    Objective.PROBS.value: _probs,
    Objective.TOPK.value: _topk,
    Objective.TOPK_TAIL.value: _topk_tail,
    Objective.FORWARD_KL.value: _forward_kl,
    Objective.REVERSE_KL.value: _reverse_kl,
    Objective.JS.value: _js,
}


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p)."""
    return expectation(log_q, _finite(log_q) - log_p)


def _finite(log_q: Tensor) -> Tensor:
    """Where the probability is 0, any number."""
    return log_q.masked_fill(log_q == -torch.inf, 0)


def _target_log_probs(rows: Rows) -> Tensor:
    return torch.log_softmax(_target_logits(rows), -1)


def _target_logits(rows: Rows) -> Tensor:
    return rows.target.to(COMPUTE_DTYPE[rows.input.dtype]) * rows.spec.target_scale


def _class_weights(rows: Rows) -> Tensor | None:
    return None if rows.weight is None else savable(rows.weight).to(COMPUTE_DTYPE[rows.input.dtype])


def listed(rows: Rows) -> tuple[Tensor, Tensor]:
    """The class indices of a top-k target and their probabilities, (N, K); what is ignored has none."""
    assert rows.probs is not None
    valid = rows.target != rows.spec.ignore_index
    return torch.where(valid, rows.target, 0), torch.where(valid, rows.probs.to(COMPUTE_DTYPE[rows.input.dtype]), 0)


def _smoothed(loss: Tensor, weight: Tensor | None, spec: Spec, log_p: Tensor) -> Tensor:
    if not spec.label_smoothing:
        return loss
    return loss - spec.label_smoothing / log_p.shape[-1] * (log_p.sum(-1) if weight is None else _dot(weight, log_p))


def smooth_probs(q: Tensor, weight: Tensor | None, spec: Spec) -> Tensor:
    """q' = w ((1 - eps) q + eps / V)."""
    if spec.label_smoothing:
        q = q * (1 - spec.label_smoothing) + spec.label_smoothing / q.shape[-1]
    return q if weight is None else q * weight


def selected(rows: Rows) -> tuple[Tensor, Tensor]:
    """(log-probabilities of the listed classes (N, K), 0 where ignored; entropy (N,), 0 where all are)."""
    valid = rows.target != rows.spec.ignore_index
    some = valid.any(-1)
    log_p = torch.log_softmax(transform(_without(rows.flat(), ~some).input, rows.spec), -1)
    log_prob = log_p.gather(1, torch.where(valid, rows.target, 0))
    return torch.where(valid, log_prob, 0), torch.where(some, -expectation(log_p, log_p), 0)


# ---- the backend interface ------------------------------------------------------------------------------------------


def row_loss(rows: Rows, extras: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss (N,), stats (5, N): centre, log_sum, log_prob, mass, entropy; with extras argmax (N,) and the rank (N,) of
    a class index, the number of larger logits, else empty). All are 0 of a row that is ignored."""
    rows = rows.flat()
    result, valid = row_result(rows), valid_rows(rows)
    z = transform(rows.input, rows.spec)
    top = z.amax(-1) if z.shape[-1] else result.lse
    top = top if valid is None else torch.where(valid, top, 0)
    stats = torch.stack([top, result.lse - top, result.log_prob, _mass(rows), result.entropy])
    none = rows.input.new_empty(0, dtype=torch.int64)
    return result.loss, stats, argmax(rows) if extras else none, rank(rows) if extras else none


def argmax(rows: Rows) -> Tensor:
    """The most probable class, (N,); 0 where the target is ignored."""
    largest, valid = transform(rows.flat().input.detach(), rows.spec).argmax(-1), valid_rows(rows)
    return largest if valid is None else torch.where(valid, largest, 0)


def target_logits(rows: Rows) -> Tensor:
    """The transformed logit of each row's class index, (N,), as it was read; 0 where that is ignored."""
    valid = rows.target != rows.spec.ignore_index
    if not rows.input.shape[-1]:
        return torch.zeros_like(rows.target, dtype=COMPUTE_DTYPE[rows.input.dtype])
    x_y = rows.logits_of(torch.where(valid, rows.target, 0)[:, None])[:, 0]
    return torch.where(valid, transform(x_y, rows.spec), 0)


def rank(rows: Rows) -> Tensor:
    """How many logits are larger than the target's, (N,); 0 where it is ignored."""
    if rows.spec.objective != Objective.INDEX:
        return rows.input.new_empty(0, dtype=torch.int64)
    valid = rows.target != rows.spec.ignore_index
    x_y = rows.logits_of(torch.where(valid, rows.target, 0)[:, None])
    return torch.where(valid, (rows.flat().input > x_y).sum(-1), 0)


def _mass(rows: Rows) -> Tensor:
    """The total weight that a row's loss puts on -log p: the T of docs/math.md."""
    spec, w = rows.spec, _class_weights(rows)
    if spec.objective == Objective.PROBS:
        return smooth_probs(rows.target.to(COMPUTE_DTYPE[rows.input.dtype]), w, spec).sum(-1)
    valid = valid_rows(rows)
    if valid is None:
        return rows.input.new_ones(count_rows(rows.input), dtype=COMPUTE_DTYPE[rows.input.dtype])
    if spec.objective == Objective.INDEX:
        mass = valid.to(COMPUTE_DTYPE[rows.input.dtype]) if w is None else w[torch.where(valid, rows.target, 0)]
    else:
        indices, q = listed(rows)
        mass = (q if w is None else q * w[indices]).sum(-1)
    if spec.label_smoothing:
        smooth = spec.label_smoothing * (1 if w is None else w.mean())
        mass = (1 - spec.label_smoothing) * mass + smooth
    return torch.where(valid, mass, 0)


def row_grad(rows: Rows, stats: Tensor, upstream: list[Tensor | None], out: Tensor | None = None) -> Tensor:
    """d input, in `out` if given, from the upstream gradients of (loss, lse, log_prob, entropy), each (N,) or None."""
    with torch.enable_grad():
        x = rows.input.detach().requires_grad_()
        result = row_result(rows._replace(input=x))
        pairs = [(r, g) for r, g in zip(result, upstream, strict=True) if g is not None]
        (dx,) = torch.autograd.grad([r for r, _ in pairs], x, [g.to(r.dtype) for r, g in pairs])
    asked = torch.zeros(count_rows(rows.input), dtype=torch.bool, device=dx.device)
    for g in (g for _, g in pairs):
        asked = asked | (g != 0)
    valid = valid_rows(rows)
    asked = asked if valid is None else asked & valid
    dx = torch.where(asked.reshape(*dx.shape[:-1], 1), dx, 0)  # exact zeros even where the row holds NaN
    return dx if out is None else out.copy_(dx)


def refuses(device: torch.device, dtype: torch.dtype, target_dtype: torch.dtype, objective: Objective) -> str | None:
    """The reference takes everything that reaches a backend."""
    return None
