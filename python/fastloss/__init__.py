"""fastloss: the loss layer for language models.

`fastloss.cross_entropy` takes and returns what `torch.nn.functional.cross_entropy` does, reads the logits once and
writes their gradient once.
"""

from .backends import explain, use_backend
from .backends.native import empty_cache
from .contrastive import info_nce
from .divergences import js_div_with_logits, kl_div_with_logits
from .logprobs import RowStats, row_stats, selective_log_softmax, softmax_entropy
from .losses import CrossEntropyStats, cross_entropy
from .nn import CrossEntropyLoss
from .pointer import pointer_generator_nll
from .topk import topk_cross_entropy, topk_kl_div

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyStats",
    "RowStats",
    "cross_entropy",
    "empty_cache",
    "explain",
    "info_nce",
    "js_div_with_logits",
    "kl_div_with_logits",
    "pointer_generator_nll",
    "row_stats",
    "selective_log_softmax",
    "softmax_entropy",
    "topk_cross_entropy",
    "topk_kl_div",
    "use_backend",
]
