"""fastloss: the loss layer for language models.

`fastloss.cross_entropy` takes and returns what `torch.nn.functional.cross_entropy` does, reads the logits once and
writes their gradient once.
"""

from . import lm
from .adaptive import AdaptiveLoss, UncertaintyWeighting, robust_loss
from .backends import explain, use_backend
from .backends.native import empty_cache
from .contrastive import info_nce, linear_info_nce
from .dense import binary_cross_entropy_with_logits, kl_div, l1_loss, mse_loss
from .divergences import js_div_with_logits, kl_div_with_logits
from .embeddings import cosine_embedding_loss, cosine_similarity_loss, gaussian_kl, triplet_margin_loss
from .linear import (
    linear_cross_entropy,
    linear_js_div,
    linear_kl_div,
    linear_selective_log_softmax,
    linear_topk_cross_entropy,
    linear_topk_kl_div,
)
from .logprobs import RowStats, row_stats, selective_log_softmax, softmax_entropy
from .losses import CrossEntropyStats, cross_entropy
from .nn import CrossEntropyLoss, KLDivLoss, LinearCrossEntropyLoss
from .parallel import VocabShard
from .pointer import pointer_generator_nll
from .topk import topk_cross_entropy, topk_kl_div

__version__ = "0.1.0"

__all__ = [
    "AdaptiveLoss",
    "CrossEntropyLoss",
    "CrossEntropyStats",
    "KLDivLoss",
    "LinearCrossEntropyLoss",
    "RowStats",
    "UncertaintyWeighting",
    "VocabShard",
    "binary_cross_entropy_with_logits",
    "cosine_embedding_loss",
    "cosine_similarity_loss",
    "cross_entropy",
    "empty_cache",
    "explain",
    "gaussian_kl",
    "info_nce",
    "js_div_with_logits",
    "kl_div",
    "kl_div_with_logits",
    "l1_loss",
    "linear_cross_entropy",
    "linear_info_nce",
    "linear_js_div",
    "linear_kl_div",
    "linear_selective_log_softmax",
    "linear_topk_cross_entropy",
    "linear_topk_kl_div",
    "lm",
    "mse_loss",
    "pointer_generator_nll",
    "robust_loss",
    "row_stats",
    "selective_log_softmax",
    "softmax_entropy",
    "topk_cross_entropy",
    "topk_kl_div",
    "triplet_margin_loss",
    "use_backend",
]
