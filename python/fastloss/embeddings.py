"""Losses between vectors: embeddings, and the latent variables of an autoencoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .public import public


@public
def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""``torch.nn.functional.cosine_embedding_loss(input1, input2, target, margin, reduction=...)``

    exactly: torch's function.
    """
    return F.cosine_embedding_loss(input1, input2, target, margin, size_average, reduce, reduction)


@public
def cosine_similarity_loss(
    input: Tensor, target: Tensor, *, dim: int = -1, eps: float = 1e-8, reduction: str = "mean"
) -> Tensor:
    r"""``1 - F.cosine_similarity(input, target, dim, eps)``

    Args:
        input, target: of the same shape; vectors lie along `dim`.
        eps: the least that either length counts as.
        reduction: "none", "mean" or "sum" over the vectors.
    """
    if input.shape != target.shape:
        raise ValueError(f"target: expected input's shape {tuple(input.shape)}, got {tuple(target.shape)}")
    return _reduced(1 - F.cosine_similarity(input, target, dim, eps), reduction)


@public
def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""``torch.nn.functional.triplet_margin_loss(anchor, positive, negative, margin, p, eps, swap, reduction=...)``

    exactly: torch's function.
    """
    return F.triplet_margin_loss(anchor, positive, negative, margin, p, eps, swap, size_average, reduce, reduction)


@public
def gaussian_kl(
    mean: Tensor,
    log_var: Tensor,
    prior_mean: Tensor | float = 0.0,
    prior_log_var: Tensor | float = 0.0,
    *,
    reduction: str = "mean",
) -> Tensor:
    r"""``0.5 * (log_var.exp() + mean ** 2 - 1 - log_var).sum(-1)``

    KL(N(mean, exp(log_var)) || N(0, 1)) of each vector, the regulariser of a variational autoencoder: Kingma & Welling
    2014 (arXiv:1312.6114, appendix B). Of diagonal Gaussians; against N(prior_mean, exp(prior_log_var)) where given.

    Args:
        mean, log_var: (..., D), of the same shape, in nats.
        prior_mean, prior_log_var: numbers, or tensors that broadcast to them.
        reduction: "none" (...), "mean" or "sum" over the vectors.

    Near its minimum, where the exponential and the rest cancel, the loss keeps its digits.
    """
    if mean.shape != log_var.shape:
        raise ValueError(f"log_var: expected mean's shape {tuple(mean.shape)}, got {tuple(log_var.shape)}")
    d = log_var - prior_log_var
    precision = torch.exp(-torch.as_tensor(prior_log_var, dtype=mean.dtype, device=mean.device))
    return _reduced(0.5 * (torch.expm1(d) - d + (mean - prior_mean).square() * precision).sum(-1), reduction)


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()
