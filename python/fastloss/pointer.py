"""The pointer-generator network's loss: a word is generated from the vocabulary, or copied from the source."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import arguments
from .evaluate import row_losses
from .parallel import VocabShard
from .public import public_loss
from .reduction import reduce_rows
from .spec import Objective, Rows, make_spec


@public_loss
def pointer_generator_nll(
    input: Tensor,
    gate_logit: Tensor,
    attention: Tensor,
    source_ids: Tensor,
    target: Tensor,
    *,
    coverage_weight: float = 0.0,
    eps: float = 0.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    out_dtype: torch.dtype | None = None,
    shard: VocabShard | None = None,
) -> Tensor:
    r"""``-log(g * P_vocab(target) + (1 - g) * (attention * (source_ids == target)).sum(-1) + eps)``

    with P_vocab = softmax(input) and g = sigmoid(gate_logit): See, Liu & Manning 2017 (arXiv:1704.04368), equation 9. A
    word outside the vocabulary has an id from V on, in `source_ids` and `target` alike, and can only be copied.

    Args:
        input: the generator's logits (B, T, V); float32, bfloat16, float16 or float64, any strides as in
            `cross_entropy`.
        gate_logit: (B, T), of the probability to generate (p_gen before its sigmoid, equation 8).
        attention: (B, T, S) over the source words, non-negative.
        source_ids: (B, S) extended ids, int64, int32 or uint8.
        target: (B, T) extended ids, >= 0, or `ignore_index`.
        coverage_weight: adds this times sum_s min(attention_ts, sum of attention_t's, t' < t) at each step (equations
            10, 12 and 13; the paper's lambda, 1).
        eps: added to the probability. A word that is neither in the vocabulary nor in the source has probability zero,
            and an infinite loss, unless it is ignored or eps > 0.
        softcap, logit_scale: of `input`, as in `cross_entropy`.
        token_weight, mask: (B, T), as in `kl_div_with_logits`; reduction, normalizer, out_dtype, shard
            likewise.

    Returns:
        A scalar, or with reduction="none" (B, T). Differentiable in input, gate_logit and attention.

    Raises:
        ValueError, RuntimeError, TypeError: naming the argument.

    Memory: the gradient of input, and O(B T S) beyond it; never a distribution over the extended vocabulary.
    """
    x = arguments.classes_last(input)
    if input.dim() != 3:
        raise RuntimeError(f"input: expected logits of shape (B, T, V), got {tuple(input.shape)}")
    B, T, V = input.shape
    V = V if shard is None else shard.vocab_size
    S = attention.shape[-1] if isinstance(attention, Tensor) and attention.dim() else 0
    gate = arguments.beside(gate_logit, "gate_logit", input, torch.Size((B, T)))
    weights = arguments.beside(attention, "attention", input, torch.Size((B, T, S)))
    source = arguments.beside(source_ids, "source_ids", input, torch.Size((B, S)), integral=True)
    y = arguments.beside(target, "target", input, torch.Size((B, T)), integral=True)
    to = arguments.as_reduction(input, reduction, token_weight, mask, normalizer, out_dtype)
    spec = make_spec(ignore_index, 0.0, 0.0, softcap, logit_scale, Objective.INDEX)

    known = torch.where(y < V, y, spec.ignore_index).reshape(-1)
    generated = -row_losses(Rows(x, known, None, spec), shard=shard).loss.reshape(B, T)
    generated = torch.where(y < V, generated, -torch.inf)
    gate, weights = gate.to(generated.dtype), weights.to(generated.dtype)
    copied = (weights * (source[:, None, :] == y[..., None])).sum(-1)
    loss = -_log_mixture(generated, copied, gate, eps)
    if coverage_weight:
        loss = loss + coverage_weight * torch.minimum(weights, weights.cumsum(1) - weights).sum(-1)
    loss = torch.where(y == spec.ignore_index, 0, loss)
    # What counts is decided by the target as given: a word outside the vocabulary does.
    loss = reduce_rows(loss.reshape(-1), Rows(x, y.reshape(-1), None, spec), to).to(to.dtype)
    return loss.reshape(B, T) if reduction == "none" else loss


def _log_mixture(log_generated: Tensor, copied: Tensor, gate: Tensor, eps: float) -> Tensor:
    """log(g P + (1 - g) c + eps). A part that is zero is left out, so that no gradient meets its infinity."""
    parts = [F.logsigmoid(gate) + log_generated.masked_fill(log_generated == -torch.inf, 0)]
    parts.append(F.logsigmoid(-gate) + torch.where(copied > 0, copied, 1).log())
    absent = [log_generated == -torch.inf, copied <= 0]
    if eps:
        parts.append(torch.full_like(gate, eps).log())
        absent.append(torch.zeros_like(absent[0]))
    stacked = torch.stack([p.masked_fill(no, -torch.inf) for p, no in zip(parts, absent, strict=True)])
    return torch.logsumexp(stacked, 0)
