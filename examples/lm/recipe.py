"""How the demo's model is trained: its optimizer, its learning rate, its windows of tokens; and options' types."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

LEARNING_RATE, WARMUP, MAX_GRADIENT = 1e-3, 20, 1.0


def optimizer(parameters: Iterable[nn.Parameter], steps: int) -> tuple[AdamW, LambdaLR]:
    """AdamW, and what sets its learning rate: up in a straight line, then down along a cosine."""

    def rate(step: int) -> float:
        progress = min(1.0, step / steps)
        return min(1.0, (step + 1) / WARMUP) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    adamw = AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.1, fused=True)
    return adamw, LambdaLR(adamw, rate)


def windows(tokens: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """The tokens from each start on, (B, context), and those that follow each of them."""
    at = starts[:, None] + torch.arange(context)
    return tokens[at].long(), tokens[at + 1].long()


def at_least(minimum: int) -> Callable[[str], int]:
    """The type of a command line's option."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, got {text!r}")
        return int(text)

    return number
