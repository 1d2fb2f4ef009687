"""The losses that are measured: torch's expression, as its users write it, and fastloss's of the same value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss

if TYPE_CHECKING:
    from .cases import Case

K = 64  # of a teacher's classes that were stored
SOURCE = 400  # words that can be copied, as in See et al. 2017
UNKNOWN = 20  # of them outside the vocabulary
Place = torch.device  # a field of Loss is called torch


def _random_indices(case: Case, device: torch.device) -> Tensor:
    return torch.randint(case.V, (case.N,), device=device)


def _random_logits(case: Case, device: torch.device) -> Tensor:
    return torch.empty(case.N, case.V, dtype=case.torch_dtype(), device=device).normal_()


class Loss(NamedTuple):
    """Both take (logits, target, **arguments) and return a scalar. `arguments` and `target` are made on a device.
    `dense`: the target is as large as the logits. `memory`: the logits' bytes that torch's takes at its peak."""

    torch: Callable[..., Tensor]
    ours: Callable[..., Tensor] = fastloss.cross_entropy
    arguments: Callable[[Case, Place], dict[str, Any]] = lambda case, device: {}
    target: Callable[[Case, Place], Tensor] = _random_indices
    dense: bool = False
    memory: int = 9


# ---- torch's expressions --------------------------------------------------------------------------------------------


def softcapped(x: Tensor, target: Tensor, softcap: float, z_loss: float) -> Tensor:
    """Of fastloss's softcap and z_loss."""
    z = softcap * torch.tanh(x / softcap)
    return F.cross_entropy(z, target) + z_loss * torch.logsumexp(z, -1).square().mean()


def forward_kl(x: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(x.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def reverse_kl(x: Tensor, teacher: Tensor, direction: str) -> Tensor:
    return F.kl_div(teacher.log_softmax(-1), x.log_softmax(-1), reduction="batchmean", log_target=True)


def js(x: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """As distillation trainers write it: the mixture by logsumexp of stacked log-probabilities."""
    log_p, log_q = x.log_softmax(-1), teacher.log_softmax(-1)
    log_m = torch.logsumexp(torch.stack([log_q + math.log(beta), log_p + math.log(1 - beta)]), 0)
    parts = [F.kl_div(log_m, log, reduction="batchmean", log_target=True) for log in (log_q, log_p)]
    return beta * parts[0] + (1 - beta) * parts[1]


def topk_kl(x: Tensor, indices: Tensor, probs: Tensor, tail: str = "ignore") -> Tensor:
    """By way of a dense target; without a tail, whose lump torch has no short expression for."""
    dense = torch.zeros_like(x).scatter(1, indices, probs.to(x.dtype))
    return F.kl_div(x.log_softmax(-1), dense, reduction="batchmean")


def log_prob_and_entropy(x: Tensor, index: Tensor) -> Tensor:
    log_p = x.log_softmax(-1)
    return log_p.gather(-1, index[:, None]).mean() - (log_p.exp() * log_p).sum(-1).mean()


def pointer_generator(
    x: Tensor, target: Tensor, gate_logit: Tensor, attention: Tensor, source_ids: Tensor, eps: float
) -> Tensor:
    """The textbook's: a distribution over the extended vocabulary."""
    B, T, S = attention.shape
    gate = torch.sigmoid(gate_logit)[..., None].to(x.dtype)
    generated = gate * x.view(B, T, -1).softmax(-1)
    extended = torch.cat([generated, generated.new_zeros(B, T, UNKNOWN)], -1)
    copied = (1 - gate) * attention.to(x.dtype)
    extended = extended.scatter_add(-1, source_ids[:, None].expand(B, T, S), copied)
    return -(extended.gather(-1, target.view(B, T, 1)) + eps).log().mean()


def linear_then_loss(x: Tensor, target: Tensor, linear_weight: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, linear_weight), target)


def chunked(x: Tensor, target: Tensor, linear_weight: Tensor) -> Tensor:
    """torch's own without all logits, from 2.13 on."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, linear_weight, target, options=options)


def liger_linear(x: Tensor, target: Tensor, linear_weight: Tensor) -> Tensor:
    """Liger-Kernel's fused linear cross-entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, linear_weight, target)


# ---- fastloss's, where it is not one call ----------------------------------------------------------------------------


def _log_prob_and_entropy(x: Tensor, index: Tensor) -> Tensor:
    log_prob, entropy = fastloss.selective_log_softmax(x, index, return_entropy=True)
    return log_prob.mean() + entropy.mean()


def linear(x: Tensor, target: Tensor, linear_weight: Tensor) -> Tensor:
    return fastloss.linear_cross_entropy(x, linear_weight, target)


def _pointer_generator(x: Tensor, target: Tensor, attention: Tensor, **arguments: Any) -> Tensor:
    B, T, _ = attention.shape
    arguments["gate_logit"] = arguments["gate_logit"].view(B, T)
    return fastloss.pointer_generator_nll(x.view(B, T, -1), target=target.view(B, T), attention=attention, **arguments)


# ---- their inputs ---------------------------------------------------------------------------------------------------


def _random_probs(case: Case, device: torch.device) -> Tensor:
    return _random_logits(case, device).softmax(-1)


def _topk_probs(case: Case, device: torch.device) -> dict[str, Any]:
    return {"probs": torch.rand(case.N, K, device=device).softmax(-1) * 0.9}


def _topk_probs_and_tail(case: Case, device: torch.device) -> dict[str, Any]:
    return {**_topk_probs(case, device), "tail": "lump"}


def _topk_indices(case: Case, device: torch.device) -> Tensor:
    """Distinct in each row."""
    return (torch.randint(case.V, (case.N, 1), device=device) + torch.arange(K, device=device) * (case.V // K)) % case.V


def _linear_weight(case: Case, device: torch.device) -> dict[str, Any]:
    weight = torch.empty(case.V, case.H, dtype=case.torch_dtype(), device=device).normal_(std=case.H**-0.5)
    return {"linear_weight": weight.requires_grad_(case.backward)}


def _words(case: Case, device: torch.device) -> Tensor:
    return torch.randint(case.V + UNKNOWN, (case.N,), device=device)


def _article(case: Case, device: torch.device) -> dict[str, Any]:
    B = min(8, case.N)
    T = case.N // B
    return {
        "gate_logit": torch.randn(B, T, device=device),
        "attention": torch.rand(B, T, SOURCE, device=device).softmax(-1),
        "source_ids": torch.randint(case.V + UNKNOWN, (B, SOURCE), device=device),
        "eps": 1e-12,
    }


LOSSES = {
    "plain": Loss(F.cross_entropy),
    "label smoothing": Loss(F.cross_entropy, arguments=lambda case, device: {"label_smoothing": 0.1}),
    "class weights": Loss(
        F.cross_entropy,
        arguments=lambda case, device: {"weight": torch.rand(case.V, device=device).to(case.torch_dtype())},
    ),
    "probabilities": Loss(
        F.cross_entropy, target=lambda case, device: _random_logits(case, device).softmax(-1), dense=True, memory=12
    ),
    "softcap + z-loss": Loss(softcapped, arguments=lambda case, device: {"softcap": 30.0, "z_loss": 1e-4}, memory=14),
    "forward KL": Loss(forward_kl, fastloss.kl_div_with_logits, target=_random_logits, dense=True, memory=14),
    "reverse KL": Loss(
        reverse_kl, fastloss.kl_div_with_logits, lambda case, device: {"direction": "reverse"}, _random_logits, True, 14
    ),
    "JS": Loss(js, fastloss.js_div_with_logits, lambda case, device: {"beta": 0.5}, _random_logits, True, 24),
    "top-k KL": Loss(topk_kl, fastloss.topk_kl_div, _topk_probs, _topk_indices, memory=14),
    "top-k KL, lumped tail": Loss(
        topk_kl,
        fastloss.topk_kl_div,
        lambda case, device: {**_topk_probs(case, device), "tail": "lump"},
        _topk_indices,
        memory=14,
    ),
    "log-prob + entropy": Loss(log_prob_and_entropy, _log_prob_and_entropy, memory=14),
    "linear": Loss(linear_then_loss, linear, _linear_weight),
    "pointer-generator": Loss(pointer_generator, _pointer_generator, _article, _words, memory=16),
}
