"""Vocabulary-parallel cross-entropy as Megatron-LM and TransformerEngine call it.

Where results differ from theirs, and why: docs/scaling.md, "Coming from Megatron".
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..arguments import refuse
from ..losses import cross_entropy
from ..parallel import VocabShard
from ..parallel.groups import rank_and_size
from ..public import public

_CONVENTIONS = ("torch", "megatron")


@public
def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    tp_group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    smoothing_convention: str = "megatron",
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    r"""``megatron.core.tensor_parallel.vocab_parallel_cross_entropy(vocab_parallel_logits, target, label_smoothing)``

    which is ``F.cross_entropy`` of each token over the logits of all tensor-parallel ranks.

    Args:
        vocab_parallel_logits: [s, b, V / tp], this rank's part of the logits; parts of equal size, in the order of
            ranks. Not changed (Megatron's are overwritten by their softmax).
        target: [s, b], ids in the whole vocabulary.
        label_smoothing: in [0, 1).
        tp_group: the tensor-parallel group; None is Megatron's own, where Megatron runs, else all ranks.
        vocab_size: V without padding; what the logits hold beyond it is ignored. By default all of it counts, as in
            Megatron.
        smoothing_convention: "megatron" spreads eps over the V - 1 other classes, which is torch's smoothing of
            eps V / (V - 1); "torch" over all V. In both, V is the whole vocabulary: Megatron takes a rank's part for
            it, and its ranks disagree about the loss.
        ignore_index: tokens of this target have zero loss and gradient; Megatron has none, and masks the losses.
        options: of `fastloss.cross_entropy`: z_loss, softcap, logit_scale, token_weight, inplace.

    Returns:
        [s, b], float32.

    Raises: as `fastloss.cross_entropy`.  Memory: the gradient, and O(s b); no softmax is kept.
    """
    _check_convention(smoothing_convention)
    shard = _shard_of(vocab_parallel_logits, _tensor_parallel(tp_group), vocab_size)
    if label_smoothing > 0 and smoothing_convention == "megatron":
        label_smoothing = label_smoothing * shard.vocab_size / max(shard.vocab_size - 1, 1)
    return _per_token(
        vocab_parallel_logits, target, shard, label_smoothing=label_smoothing, ignore_index=ignore_index, **options
    )


@public
def parallel_cross_entropy(
    inp: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    reduce_loss: bool = False,
    dist_process_group: dist.ProcessGroup | None = None,
    ignore_idx: int = -100,
    is_cg_capturable: bool = False,
    z_loss_weight: float = 0.0,
    *,
    vocab_size: int | None = None,
    **options: Any,
) -> Tensor:
    r"""``transformer_engine.pytorch.parallel_cross_entropy(inp, target, label_smoothing, reduce_loss, ...)``

    which is ``F.cross_entropy`` over the logits of all ranks of the group; without a group, of one.

    Args:
        inp: [B, SQ, V / ranks] or [SQ, B, V / ranks], this rank's part of the logits; not changed.
        target: of inp's leading dimensions, ids in the whole vocabulary; any order that flattens alike.
        label_smoothing: torch's, over all V; TransformerEngine smooths by a rank's part, and its ranks disagree.
        reduce_loss: the mean over targets that are not ignored, instead of each token's loss.
        dist_process_group: None: this rank has the whole vocabulary.
        ignore_idx: targets of this index have zero loss and gradient. The mean of no target is 0, as there.
        is_cg_capturable: nothing here waits for the device but the first call of its kind.
        z_loss_weight: adds this times lse ** 2.
        vocab_size: V without padding, by default all that the ranks hold.
        options: of `fastloss.cross_entropy`.

    Returns:
        float32: of inp's leading dimensions or, with reduce_loss, a scalar.

    Raises: as `fastloss.cross_entropy`.  Memory: the gradient, and O(B SQ).
    """
    if dist_process_group is not None:
        shard = _shard_of(inp, dist_process_group, vocab_size)
    else:
        shard, inp = None, _without_padding(inp, vocab_size)
    loss = _per_token(
        inp, target, shard, label_smoothing=label_smoothing, ignore_index=ignore_idx, z_loss=z_loss_weight, **options
    )
    return loss.sum() / (target != ignore_idx).sum().clamp(min=1) if reduce_loss else loss


def _check_convention(name: str) -> None:
    if name not in _CONVENTIONS:
        raise ValueError(f"smoothing_convention: expected one of {', '.join(_CONVENTIONS)}, got {name!r}")


def _tensor_parallel(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group itself, or Megatron's where it runs."""
    state = sys.modules.get("megatron.core.parallel_state")
    return state.get_tensor_model_parallel_group() if group is None and state is not None else group


def _shard_of(logits: Tensor, group: dist.ProcessGroup | None, vocab_size: int | None) -> VocabShard:
    padded = logits.shape[-1] * rank_and_size(group)[1]
    return VocabShard.even(padded if vocab_size is None else vocab_size, group, padded_size=padded)


def _without_padding(logits: Tensor, vocab_size: int | None) -> Tensor:
    if vocab_size is None:
        return logits
    if not 0 < vocab_size <= logits.shape[-1]:
        raise ValueError(f"vocab_size: expected at most the logits' {logits.shape[-1]} classes, got {vocab_size}")
    return logits[..., :vocab_size]


def _per_token(logits: Tensor, target: Tensor, shard: VocabShard | None, **options: Any) -> Tensor:
    refuse("parallel_cross_entropy", options, "return_stats", "normalizer", "size_average", "reduce")
    y = target.reshape(logits.shape[:-1])
    return cross_entropy(logits.movedim(-1, 1), y, reduction="none", out_dtype=torch.float32, shard=shard, **options)
