"""The losses from hidden states and the weight of the last layer: the logits never exist all at once."""

from . import flops as _flops  # noqa: F401  (tells torch's counter of our operators)
from .cross_entropy import linear_cross_entropy
from .divergences import linear_js_div, linear_kl_div
from .heads import MAX_CHUNK_BYTES
from .listed import linear_selective_log_softmax, linear_topk_cross_entropy, linear_topk_kl_div

__all__ = [
    "MAX_CHUNK_BYTES",
    "linear_cross_entropy",
    "linear_js_div",
    "linear_kl_div",
    "linear_selective_log_softmax",
    "linear_topk_cross_entropy",
    "linear_topk_kl_div",
]
