"""The demo's language model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

WIDTH, LAYERS, HEADS = 256, 4, 4


class Block(nn.Module):
    """Causal self-attention and an MLP, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, WIDTH)
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1))  # (B, T, 3, HEADS, WIDTH / HEADS)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """A decoder-only transformer whose head is its embedding, transposed."""

    def __init__(self, vocab: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, WIDTH)
        self.positions = nn.Parameter(torch.zeros(context, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def hidden(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, WIDTH)
        """What the head is applied to."""
        # The head wants small embeddings. Unscaled, the first LayerNorm would enlarge their gradients 50 times, and
        # training every rounding error with them: two runs with the very same loss would drift apart.
        x = math.sqrt(WIDTH) * self.embedding(tokens) + self.positions[: tokens.shape[1]]
        return self.norm(self.blocks(x))

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, vocab)
        return self.hidden(tokens) @ self.embedding.weight.T
