"""Models as small as an example can do with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Block(nn.Module):
    """Self-attention and an MLP, each added to its input."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Tokens (B, T) to hidden states (B, T, width)."""

    def __init__(self, vocab: int, width: int, context: int, layers: int = 2, heads: int = 4, causal: bool = True):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.positions = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(width))

    def forward(self, tokens: Tensor) -> Tensor:
        x = math.sqrt(self.embedding.embedding_dim) * self.embedding(tokens)
        return self.norm(self.blocks(x + self.positions[: tokens.shape[1]]))


class Recurrent(nn.Module):
    """The same, by an RNN, an LSTM or a GRU."""

    def __init__(self, kind: str, vocab: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.recurrence = getattr(nn, kind.upper())(width, width, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.recurrence(self.embedding(tokens))[0])


class LanguageModel(nn.Module):
    """Tokens (B, T) to logits (B, T, vocab)."""

    def __init__(self, body: nn.Module, vocab: int, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(tokens))


@torch.no_grad()
def generate(model: nn.Module, prompt: Tensor, length: int, context: int, temperature: float = 1.0) -> Tensor:
    """Tokens (B, T) continued to T + length by sampling."""
    tokens = prompt
    for _ in range(length):
        logits = model(tokens[:, -context:])[:, -1] / temperature
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], 1)
    return tokens
