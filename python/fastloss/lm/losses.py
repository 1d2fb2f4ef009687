"""Losses of language models over logits (..., V); with `linear_weight` over hidden states (..., H), whose logits never
exist all at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import refuse
from ..linear import linear_cross_entropy
from ..losses import cross_entropy
from ..public import public
from ..spec import COMPUTE_DTYPE
from .labels import ahead, check_shift, keep, next_token_labels, same_shape


@public
def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    shift: bool | int = True,
    ignore_index: int = -100,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    token_weight: Tensor | None = None,
    mask: Tensor | None = None,
    **options: Any,
) -> Any:
    """``F.cross_entropy(logits[:, :-k].reshape(-1, V), labels[:, k:].reshape(-1))``, ``k = int(shift) >= 1``

    without a copy of the logits: the labels are shifted instead, as Transformers' ``ForCausalLMLoss`` does.
    ``shift=k`` is the loss of multi-token prediction's k-th head: position t predicts token t + k.

    Args:
        logits: (..., T, V), float32, bfloat16, float16 or float64; or with the option `linear_weight` (V, H) hidden
            states (..., T, H).
        labels: (..., T), the tokens; or with ``shift=False`` what each position predicts.
        shift, ignore_index, attention_mask, document_ids, position_ids: which label a position predicts, and whether it
            counts; see `next_token_labels`. A label of the prompt that is not to count is set to `ignore_index`.
        token_weight: labels' shape, and shifted with them: multiplies the loss of a label, and counts in the mean's
            denominator.
        mask: labels' shape, and shifted with them: zero where a label does not count.
        options: of `fastloss.cross_entropy`: weight, reduction, label_smoothing, z_loss, softcap, logit_scale,
            normalizer, out_dtype, inplace, return_stats; or with linear_weight, linear_bias and max_chunk_bytes those
            of `fastloss.linear_cross_entropy`. A `normalizer` replaces the mean's denominator, as
            Transformers' ``num_items_in_batch``: the number of labels that count in all batches of one step.

    Returns:
        A scalar; with ``reduction="none"`` labels' shape, the loss of position t being that of the label it predicts
        (so with shift=k the last k columns are zero). With return_stats, (loss, stats). Of the logits' dtype, as torch:
        ``out_dtype=torch.float32`` for a bfloat16 model's. The mean of no label at all is NaN, its gradient zero.

    Raises:
        IndexError, TypeError, RuntimeError, ValueError: as `fastloss.cross_entropy`, naming the argument.

    Memory: that of `fastloss.cross_entropy`, and a few tensors of the labels' size.

    >>> causal_lm_loss(torch.zeros(1, 3, 4), torch.tensor([[1, 2, 3]]))
    tensor(1.3863)
    """
    if mask is not None:
        labels = keep(labels, mask=mask, ignore_index=ignore_index)
    target = next_token_labels(
        labels,
        shift=shift,
        ignore_index=ignore_index,
        attention_mask=attention_mask,
        document_ids=document_ids,
        position_ids=position_ids,
    )
    if token_weight is not None:
        token_weight = _shifted_weight(token_weight, labels, shift)
    return _classes_last(logits, target, ignore_index=ignore_index, token_weight=token_weight, **options)


@public
def masked_lm_loss(
    logits: Tensor, labels: Tensor, positions: Tensor | None = None, *, ignore_index: int = -100, **options: Any
) -> Any:
    """``F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1))``

    where labels are `ignore_index` but at the masked positions, about 15 % (BERT, arXiv:1810.04805, section 3.1). Only
    those need the head, which makes six times fewer logits::

        positions = masked_positions(labels)
        logits = head(hidden.flatten(0, 1)[positions])
        loss = masked_lm_loss(logits, labels, positions)

    Args:
        logits: (..., T, V) of every position; or with `positions` (M, V), one row for each of them. With the option
            `linear_weight` (V, H) hidden states (..., T, H) or (M, H): on the CPU only masked positions meet the head.
        labels: (..., T), the token where it was masked, elsewhere `ignore_index`.
        positions: (M), indices into the flattened labels, from `masked_positions`.
        options: of `fastloss.cross_entropy` or, with linear_weight, `fastloss.linear_cross_entropy`.

    Returns:
        A scalar; with ``reduction="none"`` labels' shape, or (M). The mean of no label is NaN, its gradient zero:
        give a `normalizer` where a batch may have nothing masked.

    Raises:
        IndexError, TypeError, RuntimeError, ValueError: as `fastloss.cross_entropy`, naming the argument.
    """
    target = next_token_labels(labels, shift=False)
    if positions is not None:
        if not isinstance(positions, Tensor):
            raise TypeError(f"argument 'positions' must be Tensor, not {type(positions).__name__}")
        if positions.dim() != 1 or logits.dim() != 2 or logits.shape[0] != positions.shape[0]:
            raise ValueError(
                f"logits: expected shape (M, V), one row for each of positions (M), got {tuple(logits.shape)} "
                f"with positions {tuple(positions.shape)}"
            )
        target = target.reshape(-1)[positions]
    return _classes_last(logits, target, ignore_index=ignore_index, **options)


@public
def next_sentence_loss(logits: Tensor, labels: Tensor, **options: Any) -> Any:
    """``F.cross_entropy(logits, labels)``

    of two classes: whether the second text follows the first (BERT, arXiv:1810.04805, section 3.1), in BERT's order of
    classes 0 where it does and 1 where it was drawn at random.

    Args:
        logits: (..., 2).
        labels: (...), 0 or 1.
        options: of `fastloss.cross_entropy`, with ignore_index.
    """
    if isinstance(logits, Tensor) and logits.shape[-1:] != (2,):
        raise ValueError(f"logits: expected shape (..., 2), got {tuple(logits.shape)}")
    return _classes_last(logits, labels, **options)


@public
def sequence_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    context: int = 0,
    shift: bool | int = True,
    ignore_index: int = -100,
    length_normalised: bool = True,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """``torch.stack([F.cross_entropy(x[:n - k], y[k:n]) for x, y, n in zip(logits, labels, lengths)]).mean()``

    with ``k = int(shift)``: the mean over sequences of each one's mean over its tokens, so that a short sequence counts
    as much as a long one; in one pass over the logits.

    Args:
        logits: (..., T, V); or with `linear_weight` (V, H) hidden states (..., T, H).
        labels: (..., T), the tokens; or with ``shift=False`` what each position predicts.
        lengths: (...), tokens of each sequence; those beyond do not count.
        mask: labels' shape, zero where a label does not count.
        context: labels with fewer than so many tokens before them in the sequence do not count: for windows of a long
            text that begin ``T - context`` after each other. `sliding_windows` makes such, the first one whole.
        shift, ignore_index: as in `causal_lm_loss`.
        length_normalised: False for the sum over each sequence's tokens instead of their mean.
        token_weight: labels' shape, shifted with them: weights of each sequence's mean or sum.
        reduction: over sequences: "mean" (of those with a label that counts; NaN if there is none), "sum", or "none"
            for (...), where a sequence without labels has zero.
        options: of `fastloss.cross_entropy`: weight, label_smoothing, z_loss, softcap, logit_scale, out_dtype, inplace;
            or with linear_weight of `fastloss.linear_cross_entropy`.

    Raises:
        IndexError, TypeError, RuntimeError, ValueError: as `fastloss.cross_entropy`, naming the argument.
    """
    refuse("sequence_cross_entropy", options, "return_stats", "normalizer", "size_average", "reduce")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: {reduction!r} is not a valid value for reduction ('none', 'mean' or 'sum')")
    kept = keep(labels, lengths=lengths, mask=mask, context=context, ignore_index=ignore_index)
    target = next_token_labels(kept, shift=shift, ignore_index=ignore_index)
    valid = target != ignore_index
    counts = valid.to(COMPUTE_DTYPE.get(logits.dtype, torch.float32))
    if token_weight is not None:
        counts = counts * _shifted_weight(token_weight, labels, shift)
    if length_normalised:
        total = counts.sum(-1, keepdim=True)
        counts = torch.where(total == 0, 0, counts / total)
    options = {"ignore_index": ignore_index, "token_weight": counts, **options}
    if reduction == "none":
        return _classes_last(logits, target, reduction="none", **options).sum(-1)
    sequences = valid.any(-1).sum() if reduction == "mean" else None
    return _classes_last(logits, target, reduction="sum", normalizer=sequences, **options)


@public
def sequence_log_likelihood(
    logits: Tensor,
    labels: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    shift: bool | int = True,
    ignore_index: int = -100,
    length_normalised: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    linear_weight: Tensor | None = None,
    linear_bias: Tensor | None = None,
) -> Tensor:
    """``logits[:, :-k].log_softmax(-1).gather(-1, labels[:, k:, None]).squeeze(-1).sum(-1)``

    with ``k = int(shift) >= 1``: the log-probability of each sequence, differentiable: what preference losses (DPO,
    arXiv:2305.18290, equation 7) compare and what ranks answers.

    Args:
        logits: (..., T, V); or with `linear_weight` (V, H) hidden states (..., T, H).
        labels: (..., T), the tokens; or with ``shift=False`` what each position predicts.
        lengths: (...), tokens of each sequence.
        mask: labels' shape, zero where a label does not count: on the prompt, to score only the answer.
        shift, ignore_index: as in `causal_lm_loss`.
        length_normalised: the mean over the labels that count instead of their sum; zero where none does.
        softcap, logit_scale: of `fastloss.cross_entropy`.
        linear_weight, linear_bias: (V, H) and (V), where `logits` are hidden states.

    Returns:
        (...), float32, float64 for float64 logits. The token log-probabilities never become 16 bit.
    """
    kept = keep(labels, lengths=lengths, mask=mask, ignore_index=ignore_index)
    target = next_token_labels(kept, shift=shift, ignore_index=ignore_index)
    dtype = COMPUTE_DTYPE.get(logits.dtype, torch.float32)
    options: dict[str, Any] = {"ignore_index": ignore_index, "softcap": softcap, "logit_scale": logit_scale}
    options |= {"linear_weight": linear_weight, "linear_bias": linear_bias}
    total = -_classes_last(logits, target, reduction="none", out_dtype=dtype, **options).sum(-1)
    return total / (target != ignore_index).sum(-1).clamp(min=1) if length_normalised else total


def _classes_last(
    logits: Tensor,
    target: Tensor,
    *,
    linear_weight: Tensor | None = None,
    linear_bias: Tensor | None = None,
    **options: Any,
) -> Any:
    """`fastloss.cross_entropy` of logits (..., V), or with a weight of hidden states (..., H), and class indices."""
    for name, value in (("logits", logits), ("labels", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"argument '{name}' must be Tensor, not {type(value).__name__}")
    if logits.dim() < 2 or logits.shape[:-1] != target.shape:
        raise ValueError(
            f"logits: expected shape {(*target.shape, 'V' if linear_weight is None else 'H')}, the labels' with the "
            f"{'classes' if linear_weight is None else 'features'} after it, got {tuple(logits.shape)}"
        )
    if linear_weight is not None:
        return linear_cross_entropy(logits, linear_weight, target, linear_bias=linear_bias, **options)
    if linear_bias is not None:
        raise TypeError("linear_bias: expected linear_weight with it")
    # A view that cross_entropy turns back: what is not reduced comes in the target's shape.
    return cross_entropy(logits.movedim(-1, 1), target, **options)


def _shifted_weight(token_weight: Tensor, labels: Tensor, shift: int) -> Tensor:
    return ahead(same_shape("token_weight", token_weight, labels), check_shift(shift), 0)
