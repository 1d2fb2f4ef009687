"""Recipes of language models, each a few lines over `fastloss.cross_entropy`; logits have their classes last, (..., V).

Everywhere `labels` are the tokens themselves, ``labels = tokens`` (``shift=True``: position t predicts label t + 1,
``shift=k``: label t + k), and a label of `ignore_index` does not count.
"""

from .labels import masked_positions, next_token_labels, sliding_windows
from .losses import (
    causal_lm_loss,
    masked_lm_loss,
    next_sentence_loss,
    sequence_cross_entropy,
    sequence_log_likelihood,
)
from .perplexity import Perplexity, perplexity

__all__ = [
    "Perplexity",
    "causal_lm_loss",
    "masked_lm_loss",
    "masked_positions",
    "next_sentence_loss",
    "next_token_labels",
    "perplexity",
    "sequence_cross_entropy",
    "sequence_log_likelihood",
    "sliding_windows",
]
