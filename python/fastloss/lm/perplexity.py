"""Perplexity and bits per byte of a corpus that comes in batches, on one machine or many."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..public import public
from .labels import check_shift, next_token_labels
from .losses import causal_lm_loss


class Perplexity:
    """``torch.exp(F.cross_entropy(all_logits, all_labels))`` of a corpus of which one batch is seen at a time.

    Exact: a float64 sum of the tokens' losses and an int64 count, so that batches of any size weigh as much as their
    tokens. Both stay on the logits' device and nothing waits for it until the result is read.

    Args:
        shift, ignore_index: as in `causal_lm_loss`; with shift=k of the tokens k positions ahead.
        device: of the sums; by default that of the first logits. Needed where `all_reduce` may come before any batch.

    >>> ppl = Perplexity()
    >>> ppl.update(torch.zeros(1, 3, 4), torch.tensor([[1, 2, 3]]), byte_count=8)
    >>> ppl.compute(), ppl.bits_per_byte()  # two tokens of two bits each
    (tensor(4.0000, dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """

    def __init__(
        self, *, shift: bool | int = True, ignore_index: int = -100, device: torch.device | str | None = None
    ) -> None:
        self.shift = check_shift(shift)
        self.ignore_index = ignore_index
        self.device = None if device is None else torch.device(device)
        self.reset()

    def reset(self) -> None:
        """Forgets every batch."""
        device = "cpu" if self.device is None else self.device  # until the first logits say where
        self.nll = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.bytes = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    @public
    def update(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        byte_count: Tensor | int = 0,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        linear_weight: Tensor | None = None,
        linear_bias: Tensor | None = None,
    ) -> None:
        """Adds a batch: logits (..., T, V), or with `linear_weight` hidden states (..., T, H), and labels (..., T), and
        the arguments of `causal_lm_loss`.

        `byte_count`: how many bytes of text the labels that count stand for, for `bits_per_byte`.
        """
        target = next_token_labels(
            labels,
            shift=self.shift,
            ignore_index=self.ignore_index,
            attention_mask=attention_mask,
            document_ids=document_ids,
            position_ids=position_ids,
        )
        options: dict[str, Any] = {"softcap": softcap, "logit_scale": logit_scale, "ignore_index": self.ignore_index}
        options |= {"linear_weight": linear_weight, "linear_bias": linear_bias}
        losses = causal_lm_loss(
            logits, target, shift=False, reduction="none", out_dtype=torch.float64, **options
        )  # summed in float64, which a reduction of float32 logits is not
        if self.device is None:
            self._move(logits.device)
        self.nll += losses.sum().to(self.device, non_blocking=True)
        self.tokens += (target != self.ignore_index).sum().to(self.device, non_blocking=True)
        self.bytes += byte_count if isinstance(byte_count, int) else byte_count.to(self.device, non_blocking=True)

    def merge(self, other: Perplexity) -> None:
        """Adds the batches that another one has seen."""
        if self.device is None and other.device is not None:
            self._move(other.device)
        self.nll += other.nll.to(self.nll.device)
        self.tokens += other.tokens.to(self.nll.device)
        self.bytes += other.bytes.to(self.nll.device)

    def all_reduce(self, group: Any = None) -> Perplexity:
        """What all processes of a group have seen, as a new Perplexity. `group`: None is all processes, and a copy of
        this one where ``torch.distributed`` is not initialised; a group of its own serves there too."""
        whole = Perplexity(shift=self.shift, ignore_index=self.ignore_index, device=self.device)
        whole.merge(self)
        initialised = torch.distributed.is_available() and torch.distributed.is_initialized()
        if group is not None or initialised:
            counts = torch.stack([whole.tokens, whole.bytes])
            torch.distributed.all_reduce(whole.nll, group=group)
            torch.distributed.all_reduce(counts, group=group)
            whole.tokens, whole.bytes = counts.unbind()
        return whole

    def mean(self) -> Tensor:
        """Nats per token, float64, (); NaN before any label that counts."""
        return self.nll / self.tokens

    def compute(self) -> Tensor:
        """The perplexity, float64, (); NaN before any label that counts."""
        return self.mean().exp()

    def bits_per_byte(self) -> Tensor:
        """The corpus's loss in bits, per byte of its text: comparable between tokenizers. Float64, ().

        Infinite where no `byte_count` was given.
        """
        return self.nll / (math.log(2) * self.bytes)

    def _move(self, device: torch.device) -> None:
        self.device = device
        self.nll, self.tokens, self.bytes = (t.to(device) for t in (self.nll, self.tokens, self.bytes))


def perplexity(
    batches: Iterable[tuple[Tensor, Tensor]], *, shift: bool | int = True, ignore_index: int = -100
) -> Tensor:
    """``torch.exp(F.cross_entropy(all_logits, all_labels))``

    of a corpus given as pairs of logits (..., T, V) and labels (..., T), one pair in memory at a time; float64, ().
    `shift` and `ignore_index` as in `causal_lm_loss`.

    >>> perplexity((model(tokens), tokens) for tokens in batches)  # doctest: +SKIP
    """
    whole = Perplexity(shift=shift, ignore_index=ignore_index)
    for logits, labels in batches:
        whole.update(logits, labels)
    return whole.compute()
