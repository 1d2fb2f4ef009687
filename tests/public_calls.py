"""A valid call of every public function, with each of its tensor arguments: what tests of all arguments take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastloss
from fastloss import lm
from fastloss.integrations import megatron

B, T, V, H, K, D = 2, 3, 11, 5, 4, 6
N = B * T


def _g() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classes(*shape: int) -> Tensor:
    y = torch.randint(V, shape, generator=_g())
    y.view(-1)[-1] = -100
    return y


def shares(*shape: int) -> Tensor:
    return torch.rand(shape, generator=_g()).softmax(-1) * 0.9


def mask(*shape: int) -> Tensor:
    m = torch.rand(shape, generator=_g()) < 0.7
    m.view(-1)[0] = True
    return m


def weights(*shape: int) -> Tensor:
    return torch.rand(shape, generator=_g()) + 0.1


def _rows() -> dict[str, Any]:
    return {"token_weight": weights(B, T), "normalizer": torch.tensor(3.0)}


def _masked() -> dict[str, Any]:
    return {**_rows(), "mask": mask(B, T)}


def _head(prefix: str = "") -> dict[str, Any]:
    seed = 2 if prefix else 3
    return {
        f"{prefix}input": numbers(B, T, H, seed=seed),
        f"{prefix}linear_weight": numbers(V, H, seed=seed + 2),
        f"{prefix}linear_bias": numbers(V, seed=seed + 4),
    }


def _chosen(name: str) -> dict[str, Any]:
    return {name: classes(B, T, K), "probs": shares(B, T, K)}


def _pairs() -> dict[str, Any]:
    vectors = {name: numbers(N, D, seed=seed) for seed, name in enumerate(("query", "key", "negatives"))}
    return {**vectors, "token_weight": weights(N), "temperature": torch.tensor(0.5)}


def _sequences() -> dict[str, Any]:
    return {"logits": numbers(B, T, V), "labels": classes(B, T), "lengths": torch.tensor([3, 2]), "mask": mask(B, T)}


def _documents() -> dict[str, Any]:
    ids = torch.tensor([[0, 0, 1], [0, 0, 0]])
    at = torch.tensor([[0, 1, 0], [0, 1, 2]])
    return {"attention_mask": torch.ones(B, T, dtype=torch.int64), "document_ids": ids, "position_ids": at}


def _update(**arguments: Any) -> Tensor:
    found = lm.Perplexity()
    found.update(**arguments)
    return found.compute()


# name -> (function, keyword arguments). The first tensor is the one that says where all belong.
CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "cross_entropy": (
        fastloss.cross_entropy,
        lambda: {
            "input": numbers(N, V),
            "target": classes(N),
            "weight": weights(V),
            "token_weight": weights(N),
            "mask": mask(N),
            "normalizer": torch.tensor(3.0),
        },
    ),
    "cross_entropy of probabilities": (
        fastloss.cross_entropy,
        lambda: {"input": numbers(N, V), "target": shares(N, V), "weight": weights(V), "token_weight": weights(N)},
    ),
    "cross_entropy, with statistics": (
        fastloss.cross_entropy,
        lambda: {"input": numbers(N, V), "target": classes(N), "mask": mask(N), "return_stats": True},
    ),
    "kl_div_with_logits": (
        fastloss.kl_div_with_logits,
        lambda: {"input": numbers(B, T, V), "target_logits": numbers(B, T, V, seed=2), **_masked()},
    ),
    "kl_div_with_logits, unreduced": (
        fastloss.kl_div_with_logits,
        lambda: {"input": numbers(B, T, V), "target_logits": numbers(B, T, V, seed=2), "reduction": "none"},
    ),
    "js_div_with_logits": (
        fastloss.js_div_with_logits,
        lambda: {"input": numbers(B, T, V), "target_logits": numbers(B, T, V, seed=2), **_masked()},
    ),
    "topk_cross_entropy": (
        fastloss.topk_cross_entropy,
        lambda: {"input": numbers(B, T, V), **_chosen("indices"), "weight": weights(V), **_masked()},
    ),
    "topk_kl_div": (
        fastloss.topk_kl_div,
        lambda: {"input": numbers(B, T, V), **_chosen("indices"), "tail": "lump", **_masked()},
    ),
    "row_stats": (fastloss.row_stats, lambda: {"input": numbers(B, T, V), "target": classes(B, T)}),
    "softmax_entropy": (fastloss.softmax_entropy, lambda: {"input": numbers(B, T, V)}),
    "selective_log_softmax": (
        fastloss.selective_log_softmax,
        lambda: {"input": numbers(B, T, V), "index": classes(B, T), "return_entropy": True},
    ),
    "selective_log_softmax of several": (
        fastloss.selective_log_softmax,
        lambda: {"input": numbers(B, T, V), "index": classes(B, T, K), "return_entropy": True},
    ),
    "pointer_generator_nll": (
        fastloss.pointer_generator_nll,
        lambda: {
            "input": numbers(B, T, V),
            "gate_logit": numbers(B, T),
            "attention": shares(B, T, D),
            "source_ids": torch.randint(V + 3, (B, D), generator=_g()),
            "target": classes(B, T),
            **_masked(),
        },
    ),
    "info_nce": (fastloss.info_nce, _pairs),
    "linear_info_nce": (fastloss.linear_info_nce, _pairs),
    "linear_cross_entropy": (
        fastloss.linear_cross_entropy,
        lambda: {**_head(), "target": classes(B, T), "weight": weights(V), **_rows()},
    ),
    "linear_cross_entropy, summed": (
        fastloss.linear_cross_entropy,
        lambda: {**_head(), "target": classes(B, T), "normalizer": torch.tensor(3.0), "reduction": "sum"},
    ),
    "linear_cross_entropy of probabilities": (
        fastloss.linear_cross_entropy,
        lambda: {**_head(), "target": shares(B, T, V), "weight": weights(V), **_rows()},
    ),
    "linear_cross_entropy, with statistics": (
        fastloss.linear_cross_entropy,
        lambda: {**_head(), "target": classes(B, T), "return_stats": True},
    ),
    "linear_kl_div": (fastloss.linear_kl_div, lambda: {**_head(), **_head("target_"), **_masked()}),
    "linear_js_div": (fastloss.linear_js_div, lambda: {**_head(), **_head("target_"), **_masked()}),
    "linear_topk_cross_entropy": (
        fastloss.linear_topk_cross_entropy,
        lambda: {**_head(), **_chosen("indices"), "weight": weights(V), **_masked()},
    ),
    "linear_topk_kl_div": (fastloss.linear_topk_kl_div, lambda: {**_head(), **_chosen("indices"), **_masked()}),
    "linear_selective_log_softmax": (
        fastloss.linear_selective_log_softmax,
        lambda: {**_head(), "index": classes(B, T), "return_entropy": True},
    ),
    "linear_selective_log_softmax of several": (
        fastloss.linear_selective_log_softmax,
        lambda: {**_head(), "index": classes(B, T, K), "return_entropy": True},
    ),
    "kl_div": (
        fastloss.kl_div,
        lambda: {"input": numbers(N, V).log_softmax(-1), "target": shares(N, V), "reduction": "batchmean"},
    ),
    "mse_loss": (
        fastloss.mse_loss,
        lambda: {"input": numbers(N, V), "target": numbers(N, V, seed=2), "weight": weights(N, V)},
    ),
    "l1_loss": (
        fastloss.l1_loss,
        lambda: {"input": numbers(N, V), "target": numbers(N, V, seed=2), "weight": weights(N, V)},
    ),
    "binary_cross_entropy_with_logits": (
        fastloss.binary_cross_entropy_with_logits,
        lambda: {"input": numbers(N, V), "target": shares(N, V), "weight": weights(N, V), "pos_weight": weights(V)},
    ),
    "cosine_embedding_loss": (
        fastloss.cosine_embedding_loss,
        lambda: {"input1": numbers(N, D), "input2": numbers(N, D, seed=2), "target": torch.ones(N)},
    ),
    "cosine_similarity_loss": (
        fastloss.cosine_similarity_loss,
        lambda: {"input": numbers(N, D), "target": numbers(N, D, seed=2)},
    ),
    "triplet_margin_loss": (
        fastloss.triplet_margin_loss,
        lambda: {name: numbers(N, D, seed=i) for i, name in enumerate(("anchor", "positive", "negative"))},
    ),
    "gaussian_kl": (
        fastloss.gaussian_kl,
        lambda: {
            **{name: numbers(N, D, seed=i) for i, name in enumerate(("mean", "log_var"))},
            **{name: numbers(N, D, seed=i) for i, name in enumerate(("prior_mean", "prior_log_var"))},
        },
    ),
    "robust_loss": (
        fastloss.robust_loss,
        lambda: {"input": numbers(N), "alpha": torch.tensor(1.5), "scale": torch.tensor(0.5)},
    ),
    "UncertaintyWeighting": (
        lambda loss: fastloss.UncertaintyWeighting(["regression"], device="cpu")(loss),
        lambda: {"loss": torch.tensor(0.3)},
    ),
    "AdaptiveLoss": (lambda input: fastloss.AdaptiveLoss(D, device="cpu")(input), lambda: {"input": numbers(N, D)}),
    "lm.causal_lm_loss": (
        lm.causal_lm_loss,
        lambda: {
            "logits": numbers(B, T, V),
            "labels": classes(B, T),
            **_documents(),
            "token_weight": weights(B, T),
            "weight": weights(V),
            "normalizer": torch.tensor(3.0),
        },
    ),
    "lm.causal_lm_loss of hidden states": (
        lm.causal_lm_loss,
        lambda: {
            "logits": numbers(B, T, H),
            "labels": classes(B, T),
            "linear_weight": numbers(V, H),
            "linear_bias": numbers(V),
        },
    ),
    "lm.masked_lm_loss": (
        lm.masked_lm_loss,
        lambda: {"logits": numbers(4, V), "labels": classes(B, T), "positions": torch.arange(4)},
    ),
    "lm.masked_positions": (lm.masked_positions, lambda: {"labels": classes(B, T)}),
    "lm.next_sentence_loss": (
        lm.next_sentence_loss,
        lambda: {"logits": numbers(B, 2), "labels": torch.arange(B) % 2},
    ),
    "lm.next_token_labels": (lm.next_token_labels, lambda: {"labels": classes(B, T), **_documents()}),
    "lm.sequence_cross_entropy": (
        lm.sequence_cross_entropy,
        lambda: {**_sequences(), "token_weight": weights(B, T)},
    ),
    "lm.sequence_log_likelihood": (lm.sequence_log_likelihood, _sequences),
    "lm.sliding_windows": (lm.sliding_windows, lambda: {"tokens": torch.arange(9), "window": 4, "stride": 2}),
    "lm.Perplexity.update": (
        _update,
        lambda: {"logits": numbers(B, T, V), "labels": classes(B, T), **_documents(), "byte_count": torch.tensor(7)},
    ),
    "vocab_parallel_cross_entropy": (
        lambda **options: megatron.parallel_cross_entropy(**options),
        lambda: {"inp": numbers(B, T, V), "target": classes(B, T)},
    ),
}


def tensors_of(arguments: dict[str, Any]) -> list[str]:
    return [name for name, value in arguments.items() if isinstance(value, Tensor)]


def outputs(found: Any) -> list[Tensor]:
    """All tensors that a call returned."""
    if isinstance(found, Tensor):
        return [found]
    return [t for t in found if isinstance(t, Tensor)]
