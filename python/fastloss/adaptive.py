"""Losses that learn their own shape, or their share: Barron's robust loss, and the weighting of several losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .public import public

_KINDS = ("regression", "classification")


@public
def robust_loss(input: Tensor, alpha: Tensor | float, scale: Tensor | float = 1.0) -> Tensor:
    r"""``abs(alpha - 2) / alpha * (((input / scale) ** 2 / abs(alpha - 2) + 1) ** (alpha / 2) - 1)``

    of each residual: the general robust loss of Barron 2019 (arXiv:1701.03077, section 2), with its limits
    ``0.5 * (input / scale) ** 2`` at alpha = 2, ``log1p(0.5 * (input / scale) ** 2)`` (Cauchy) at 0 and
    ``1 - exp(-0.5 * (input / scale) ** 2)`` (Welsch) at -inf; alpha = 1 is the smoothed L1 (Charbonnier), -2
    Geman-McClure.

    Args:
        input: residuals of any shape.
        alpha: the shape, < inf; a number or a tensor that broadcasts to input. Differentiable.
        scale: > 0, likewise.
    """
    s = torch.square(input / scale)
    alpha = torch.as_tensor(alpha, dtype=s.dtype, device=s.device)
    special = (alpha == 2) | (alpha == 0) | (alpha == -torch.inf)
    a = torch.where(special, 1, alpha)
    b = (a - 2).abs()
    # expm1 and log1p: near 0 and 2 the plain power cancels.
    loss = b / a * torch.expm1(a / 2 * torch.log1p(s / b))
    loss = torch.where(alpha == 2, s / 2, loss)
    loss = torch.where(alpha == 0, torch.log1p(s / 2), loss)
    return torch.where(alpha == -torch.inf, -torch.expm1(-s / 2), loss)


def log_partition(alpha: Tensor) -> Tensor:
    r"""``log(integral of exp(-robust_loss(x, alpha)) dx)`` for alpha in [0, 2]; float64, differentiable.

    By the trapezoidal rule after x = sinh(pi / 2 sinh(t)), which converges exponentially also for the heavy tails near
    alpha = 0: about 1e-12 with these steps. Memory: 513 numbers for each alpha.
    """
    alpha = alpha.double()[..., None]
    t = torch.linspace(-4.2, 4.2, 513, dtype=torch.float64, device=alpha.device)
    inner = math.pi / 2 * torch.sinh(t)
    step = (t[1] - t[0]) * math.pi / 2 * torch.cosh(t) * torch.cosh(inner)
    return torch.logsumexp(step.log() - robust_loss(torch.sinh(inner), alpha), -1)


class AdaptiveLoss(torch.nn.Module):
    r"""``robust_loss(x, alpha, scale) + log(scale) + log_partition(alpha)``

    The negative log-likelihood of residuals under the distribution that belongs to Barron's loss (arXiv:1701.03077,
    section 3), whose shape and scale are learned together with what makes the residuals: the partition function is what
    keeps alpha from simply discounting outliers.

    Args:
        dims: D, the size of the residuals' last dimension, each with a shape and scale of its own; or 1 for all.
        alpha: where it starts, within `alpha_range`.
        scale: where it starts, above `least_scale`.
        alpha_range: the shape stays between these, within [0, 2]; where both are the same it is not learned.
        least_scale: > 0. `learn_scale`: whether the scale is learned.
        reduction: "none", "mean" or "sum".
        device: of the parameters; None is the default device.

    Shape: (..., D) -> scalar, or (..., D) with reduction="none".
    """

    def __init__(
        self,
        dims: int = 1,
        *,
        alpha: float = 1.0,
        scale: float = 1.0,
        alpha_range: tuple[float, float] = (0.001, 1.999),
        least_scale: float = 1e-5,
        learn_scale: bool = True,
        reduction: str = "mean",
        device: Any = None,
    ) -> None:
        super().__init__()
        low, high = alpha_range
        if not 0 <= low <= high <= 2 or not low <= alpha <= high:
            raise ValueError(f"alpha: expected a number in alpha_range, within [0, 2], got {alpha} and {alpha_range}")
        if not scale > least_scale > 0:
            raise ValueError(f"scale: expected scale > least_scale > 0, got {scale} and {least_scale}")
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
        self.alpha_range, self.least_scale, self.reduction = (low, high), least_scale, reduction
        inside = 0.0 if low == high else min(max((alpha - low) / (high - low), 1e-6), 1 - 1e-6)
        latent = 0.0 if low == high else math.log(inside / (1 - inside))
        self.latent_alpha = torch.nn.Parameter(torch.full((dims,), latent, device=device), requires_grad=low < high)
        excess = math.log(math.expm1(scale - least_scale)) if scale - least_scale < 30 else scale - least_scale
        self.latent_scale = torch.nn.Parameter(torch.full((dims,), excess, device=device), requires_grad=learn_scale)

    @property
    def alpha(self) -> Tensor:
        """The shape, (D)."""
        low, high = self.alpha_range
        return low + (high - low) * torch.sigmoid(self.latent_alpha)

    @property
    def scale(self) -> Tensor:
        """The scale, (D)."""
        return self.least_scale + torch.nn.functional.softplus(self.latent_scale)

    def forward(self, input: Tensor) -> Tensor:
        """Residuals to the loss."""
        if input.dim() == 0 or self.latent_alpha.shape[0] not in (1, input.shape[-1]):
            raise ValueError(f"input: expected shape (..., {len(self.latent_alpha)}), got {tuple(input.shape)}")
        alpha, scale = self.alpha, self.scale
        loss = robust_loss(input, alpha, scale) + (scale.log() + log_partition(alpha).to(scale.dtype))
        return loss if self.reduction == "none" else loss.mean() if self.reduction == "mean" else loss.sum()


class UncertaintyWeighting(torch.nn.Module):
    r"""``sum(exp(-s_i) * loss_i * (0.5 if regression else 1) + 0.5 * s_i)``

    Several losses as one, each divided by a learned variance exp(s_i): Kendall, Gal & Cipolla 2018 (arXiv:1705.07115,
    section 3.2), where a squared error comes with 1 / (2 sigma ** 2) and a cross-entropy with 1 / sigma ** 2, either
    with log sigma.

    Args:
        kinds: of each loss, "regression" or "classification".
        device: of the parameters; None is the default device.

    Shape: as many scalars as kinds -> scalar.
    """

    def __init__(self, kinds: Sequence[str], device: Any = None) -> None:
        super().__init__()
        for kind in kinds:
            if kind not in _KINDS:
                raise ValueError(f"kinds: expected {' or '.join(map(repr, _KINDS))} for each loss, got {kind!r}")
        self.kinds = tuple(kinds)
        self.log_variance = torch.nn.Parameter(torch.zeros(len(self.kinds), device=device))

    def forward(self, *losses: Tensor) -> Tensor:
        """The losses, in the order of `kinds`."""
        if len(losses) != len(self.kinds):
            raise ValueError(f"losses: expected {len(self.kinds)}, one for each kind, got {len(losses)}")
        s = self.log_variance
        shares = s.new_tensor([0.5 if kind == "regression" else 1.0 for kind in self.kinds])
        stacked = torch.stack([loss.to(s.dtype) for loss in losses])
        return (shares * torch.exp(-s) * stacked + 0.5 * s).sum()
