"""The losses as a textbook writes them, in torch operations that any device runs and autograd differentiates.

It is the last backend in the registry, the path under `torch.func` transforms and double backward, and the file to read
first: the native and GPU kernels compute exactly this.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import COMPUTE_DTYPE
from ..spec import Spec


class RowResult(NamedTuple):
    """Per-row loss and statistics, (N,) each, in the compute dtype; loss and log_prob 0 where the target is ignored."""

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


def row_result(input: Tensor, target: Tensor, weight: Tensor | None, spec: Spec) -> RowResult:
    """Loss and statistics of logits (N, V) against class indices (N,) or class probabilities (N, V)."""
    z = transform(input, spec)
    w = None if weight is None else weight.to(z.dtype)
    log_p = torch.log_softmax(z, -1)
    lse = torch.logsumexp(z, -1)
    # log p = -inf (a masked class) is taken out before products: 0 * inf is 0 here.
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    if target.is_floating_point():
        q = smooth_probs(target.to(z.dtype), w, spec)
        log_prob = _dot(q, log_p)
        loss = -log_prob
        valid = None
    else:
        log_prob = -F.nll_loss(log_p, target, ignore_index=spec.ignore_index, reduction="none")
        valid = target != spec.ignore_index
        sharp = 1 - spec.label_smoothing
        w_y = sharp if w is None else sharp * w[torch.where(valid, target, 0)]
        loss = -w_y * log_prob if w is None and sharp else -torch.where(w_y * valid == 0, 0, w_y * log_prob)
        if spec.label_smoothing:
            loss = loss - spec.label_smoothing / z.shape[-1] * (log_p.sum(-1) if w is None else _dot(w, log_p))
    if spec.z_loss:
        loss = loss + spec.z_loss * lse**2
    if valid is not None:
        loss = torch.where(valid, loss, 0)
    return RowResult(loss, lse, log_prob, entropy)


def smooth_probs(q: Tensor, weight: Tensor | None, spec: Spec) -> Tensor:
    """q' = w ((1 - eps) q + eps / V)."""
    if spec.label_smoothing:
        q = q * (1 - spec.label_smoothing) + spec.label_smoothing / q.shape[-1]
    return q if weight is None else q * weight


def _dot(w: Tensor, log_p: Tensor) -> Tensor:
    return (w * log_p.masked_fill((log_p == -torch.inf) & (w == 0), 0)).sum(-1)


# ---- the backend interface ------------------------------------------------------------------------------------------


def row_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, extras: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (N,), stats (5, N): centre, log_sum, log_prob, mass, entropy, argmax (N,) or empty)."""
    result = row_result(input, target, weight, spec)
    z = transform(input, spec)
    top = z.amax(-1) if z.shape[-1] else result.lse
    stats = torch.stack([top, result.lse - top, result.log_prob, _mass(input, target, weight, spec), result.entropy])
    return result.loss, stats, z.argmax(-1) if extras else target.new_empty(0, dtype=torch.int64)


def _mass(input: Tensor, target: Tensor, weight: Tensor | None, spec: Spec) -> Tensor:
    """The total weight that a row's loss puts on -log p: the T of docs/math.md."""
    dtype = COMPUTE_DTYPE[input.dtype]
    w = None if weight is None else weight.to(dtype)
    if target.is_floating_point():
        return smooth_probs(target.to(dtype), w, spec).sum(-1)
    valid = target != spec.ignore_index
    if w is None:
        return valid.to(dtype)
    w_y = w[torch.where(valid, target, 0)]
    return torch.where(valid, (1 - spec.label_smoothing) * w_y + spec.label_smoothing * w.sum() / w.numel(), 0)


def row_grad(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    spec: Spec,
    stats: Tensor,
    upstream: list[Tensor | None],
    out: Tensor | None = None,
) -> Tensor:
    """d input, in `out` if given, from the upstream gradients of (loss, lse, log_prob, entropy), each (N,) or None."""
    with torch.enable_grad():
        x = input.detach().requires_grad_()
        result = row_result(x, target, weight, spec)
        pairs = [(r, g) for r, g in zip(result, upstream, strict=True) if g is not None]
        (dx,) = torch.autograd.grad([r for r, _ in pairs], x, [g.to(r.dtype) for r, g in pairs])
    rows = torch.zeros(dx.shape[:1], dtype=torch.bool, device=dx.device)
    for g in (g for _, g in pairs):
        rows = rows | (g != 0)
    if upstream[1] is None and upstream[3] is None and not target.is_floating_point():
        rows = rows & (target != spec.ignore_index)
    dx = torch.where(rows[:, None], dx, 0)  # exact zeros even where the row holds NaN
    return dx if out is None else out.copy_(dx)


def refuses(device: torch.device, dtype: torch.dtype, target_dtype: torch.dtype) -> str | None:
    """The reference takes everything that reaches a backend."""
    return None
