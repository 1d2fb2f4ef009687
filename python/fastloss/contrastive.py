"""Contrastive losses: cross-entropy whose classes are the other items of the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import MAX_CHUNK_BYTES, linear_cross_entropy
from .losses import cross_entropy
from .parallel import VocabShard
from .parallel.batch import all_rows
from .public import public
from .saved import savable
from .spec import NUMBERS


@public
def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    symmetric: bool = False,
    normalize: bool = True,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    out_dtype: torch.dtype | None = None,
    shard: VocabShard | None = None,
) -> Tensor:
    r"""``F.cross_entropy(normalize(query) @ normalize(key).T / temperature, arange(N))``

    Each query's own key against the keys of the rest of the batch: van den Oord et al. 2018 (arXiv:1807.03748),
    equation 4. With symmetric=True the mean of it and of the keys against the queries, as in CLIP (Radford et al. 2021,
    arXiv:2103.00020, figure 3).

    Args:
        query, key: (N, D), rows that belong together.
        negatives: (M, D), keys that belong to no query; not with symmetric=True.
        temperature: > 0, or a tensor of one element, which may be learned.
        normalize: whether rows are scaled to length one first (cosine similarities).
        label_smoothing, out_dtype: as in `cross_entropy`.
        token_weight: (N,) multiplies each pair's loss, and counts in the mean's denominator.
        reduction: "none", "mean" or "sum".
        shard: a `VocabShard` of the batch of all ranks: pairs [start, stop) of vocab_size are this one's, and every
            query meets the keys of all. The loss is the whole batch's, on every rank; gradients of this rank's query
            and key are those of that loss, so that data-parallel averaging of parameters' gradients must become a sum.
            Not with `negatives`.

    Returns:
        A scalar, or with reduction="none" (N,), of all ranks' rows.

    Raises:
        ValueError, RuntimeError, TypeError: naming the argument.

    Memory: the (N, N + M) similarities and their gradient.
    """
    query, key, negatives, scale = _pairs(query, key, negatives, temperature, symmetric, normalize, shard)
    labels, weights = _of_batch(query, token_weight, shard)

    def similarities(rows: Tensor, classes: Tensor) -> Tensor:
        logits = (rows if shard is None else all_rows(rows, shard, False)) @ classes.T
        return logits / savable(temperature) if isinstance(temperature, Tensor) else logits

    def loss(logits: Tensor) -> Tensor:
        return cross_entropy(
            logits,
            labels,
            reduction=reduction,
            label_smoothing=label_smoothing,
            logit_scale=scale,
            token_weight=weights,
            out_dtype=out_dtype,
            shard=shard,
        )

    logits = similarities(query, key if negatives is None else torch.cat([key, negatives]))
    if not symmetric:
        return loss(logits)
    return (loss(logits) + loss(logits.T if shard is None else similarities(key, query))) / 2


@public
def linear_info_nce(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    symmetric: bool = False,
    normalize: bool = True,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    out_dtype: torch.dtype | None = None,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
    shard: VocabShard | None = None,
) -> Tensor:
    r"""``F.cross_entropy(normalize(query) @ normalize(key).T / temperature, arange(N))``

    without the (N, N + M) similarities: `info_nce` for batches whose square does not fit, as cross-entropy whose
    classifier is the other batch. Arguments, result and errors as there; with symmetric=True the similarities are made
    twice.

    Memory: gradients of query and keys, and max_chunk_bytes.
    """
    query, key, negatives, scale = _pairs(query, key, negatives, temperature, symmetric, normalize, shard)
    if isinstance(temperature, Tensor):  # which may be learned: over the keys, it reaches every similarity
        divisor = savable(temperature)
        key = (key / divisor).to(key.dtype)
        negatives = None if negatives is None else (negatives / divisor).to(key.dtype)
    labels, weights = _of_batch(query, token_weight, shard)

    def loss(rows: Tensor, classes: Tensor) -> Tensor:
        return linear_cross_entropy(
            rows if shard is None else all_rows(rows, shard, True),
            classes,
            labels,
            reduction=reduction,
            label_smoothing=label_smoothing,
            logit_scale=scale,
            token_weight=weights,
            out_dtype=out_dtype,
            max_chunk_bytes=max_chunk_bytes,
            shard=shard,
        )

    one = loss(query, key if negatives is None else torch.cat([key, negatives]))
    return (one + loss(key, query)) / 2 if symmetric else one


def _pairs(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    symmetric: bool,
    normalize: bool,
    shard: VocabShard | None,
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """Checked, of length one if asked for, and what the similarities must be multiplied by (a tensor not yet)."""
    for name, x in (("query", query), ("key", key), ("negatives", negatives)):
        if x is None and name == "negatives":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise RuntimeError(f"{name}: expected floating point numbers, got {x.dtype}")
        if x.dim() != 2 or x.shape[1] != query.shape[1]:
            raise ValueError(f"{name}: expected shape (N, D) like query, got {tuple(x.shape)}")
    if key.shape != query.shape:
        raise ValueError(f"key: expected query's shape {tuple(query.shape)}, got {tuple(key.shape)}")
    if shard is not None and negatives is not None:
        raise ValueError("negatives: expected None with shard, whose keys are those of all ranks")
    if shard is not None and not shard.sum_hidden:
        raise ValueError("sum_hidden: expected True with a shard of the batch, whose queries get all keys' gradient")
    _check_temperature(temperature)
    if symmetric and negatives is not None:
        raise ValueError("negatives: expected None with symmetric=True, whose keys are queries too")
    if normalize:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        negatives = None if negatives is None else F.normalize(negatives, dim=-1)
    return query, key, negatives, 1.0 if isinstance(temperature, Tensor) else 1.0 / temperature


def _check_temperature(temperature: Tensor | float) -> None:
    if not isinstance(temperature, (Tensor, *NUMBERS)):
        raise TypeError(f"temperature: expected a real number or a Tensor, got {type(temperature).__name__}")
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number > 0, got {temperature}")
    elif temperature.is_complex():
        raise TypeError(f"temperature: expected a real number, got {temperature.dtype}")
    elif temperature.numel() != 1:
        raise ValueError(f"temperature: expected a number or a tensor of one element, got {tuple(temperature.shape)}")


def _of_batch(query: Tensor, token_weight: Tensor | None, shard: VocabShard | None) -> tuple[Tensor, Tensor | None]:
    """Which key is each query's own, and the pairs' weights; of the batch of all ranks."""
    labels = torch.arange(query.shape[0] if shard is None else shard.vocab_size, device=query.device)
    if shard is None or token_weight is None:
        return labels, token_weight
    return labels, all_rows(token_weight, shard, True)
