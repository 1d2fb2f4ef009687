"""BERT-style pre-training (Devlin et al. 2019, arXiv:1810.04805): masked words, and whether one text follows another.

Only the masked positions reach the head over the vocabulary: fastloss.lm.masked_positions finds them,
fastloss.lm.masked_lm_loss takes their logits alone.
"""

from __future__ import annotations

import torch
from parts import text, training
from parts.models import Transformer
from torch import Tensor, nn

from fastloss import lm

HALF = 24  # words of either text
MASKED = 0.15
MASK = text.UNKNOWN


class Bert(nn.Module):
    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.body = Transformer(vocab, width, 2 * HALF, causal=False)
        self.segments = nn.Embedding(2, width)
        self.words, self.follows = nn.Linear(width, vocab), nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(tokens)

    def next_sentence(self, hidden: Tensor) -> Tensor:
        """From the means of both texts and their product: does the second follow the first?"""
        first, second = hidden[:, :HALF].mean(1), hidden[:, HALF:].mean(1)
        return self.follows(first * second)


def make_batch(tokens: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens with some masked, labels of those, 0 where the second half follows and 1 where it does not)."""
    pairs = text.windows(tokens, batch, 2 * HALF)
    random = torch.rand(batch) < 0.5
    pairs[random, HALF:] = text.windows(tokens, batch, HALF)[random]
    masked = torch.rand(pairs.shape) < MASKED
    return pairs.masked_fill(masked, MASK), torch.where(masked, pairs, -100), random.long()


@torch.no_grad()
def accuracies(model: Bert, tokens: Tensor) -> tuple[float, float]:
    """Of the masked words, and of what follows what."""
    x, labels, random = make_batch(tokens, 256)
    hidden = model(x)
    at = lm.masked_positions(labels)
    right = model.words(hidden.flatten(0, 1)[at]).argmax(-1) == labels.flatten()[at]
    follows = model.next_sentence(hidden).argmax(-1) == random
    return right.float().mean().item(), follows.float().mean().item()


def main(argv: list[str] | None = None) -> dict[str, float]:
    options = training.begin(training.parser(__doc__, steps=500, batch=32), argv)
    train, held_out = text.split(text.documents(), 400)
    vocabulary = text.Vocabulary(train, options.vocab)
    tokens, unseen = (text.token_stream(part, vocabulary) for part in (train, held_out))
    model = Bert(len(vocabulary), options.width)
    heads = []

    def loss(step: int) -> Tensor:
        x, labels, random = make_batch(tokens, options.batch)
        hidden = model(x)
        at = lm.masked_positions(labels)
        logits = model.words(hidden.flatten(0, 1)[at])
        heads.append(len(at) / labels.numel())
        return lm.masked_lm_loss(logits, labels, at) + lm.next_sentence_loss(model.next_sentence(hidden), random)

    before = accuracies(model, unseen)
    losses = training.train(model.parameters(), loss, options.steps)
    after = accuracies(model, unseen)
    figures = {
        "loss at first": losses[0],
        "loss at last": sum(losses[-10:]) / len(losses[-10:]),
        "masked words right before": before[0],
        "masked words right": after[0],
        "next text right": after[1],
        "positions that reach the head": sum(heads) / len(heads),
    }
    return training.finish("BERT", figures, options)


if __name__ == "__main__":
    main()
