"""Contrastive pairs: a function's name and arguments beside the first line of its docstring, found among all others.

fastloss.info_nce, symmetric as in CLIP, with a temperature that is learned.
"""

from __future__ import annotations

import torch
from parts import text, training
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastloss


class Encoder(nn.Module):
    """A bag of words, and one hidden layer."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(vocab, width, padding_idx=text.PAD)
        self.layers = nn.Sequential(nn.GELU(), nn.Linear(width, width))

    def forward(self, rows: list[list[int]]) -> Tensor:
        x = self.bag(text.padded(rows))
        return x + self.layers(x)


class Pairing(nn.Module):
    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.names, self.lines = Encoder(vocab, width), Encoder(vocab, width)
        self.log_temperature = nn.Parameter(torch.tensor(0.07).log())

    def forward(self, pairs: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        return self.names([name for name, _ in pairs]), self.lines([line for _, line in pairs])


@torch.no_grad()
def retrieval(model: Pairing, pairs: list[tuple[list[int], list[int]]]) -> float:
    """How often the right line is the nearest of all."""
    names, lines = (normalize(x) for x in model(pairs))
    return ((names @ lines.T).argmax(1) == torch.arange(len(pairs))).float().mean().item()


def main(argv: list[str] | None = None) -> dict[str, float]:
    options = training.begin(training.parser(__doc__, steps=400, batch=128), argv)
    texts = [
        (text.words(f"{item.name} {item.arguments}")[:20], text.words(item.first)[:20]) for item in text.documented()
    ]
    vocabulary = text.Vocabulary([t for pair in texts for t in pair], options.vocab)
    pairs = [(vocabulary.encode(name), vocabulary.encode(line)) for name, line in texts if name and line]
    train, held_out = text.split(pairs, 300)
    model = Pairing(len(vocabulary), options.width)

    def loss(step: int) -> Tensor:
        names, lines = model([train[i] for i in torch.randint(len(train), (options.batch,))])
        return fastloss.info_nce(names, lines, temperature=model.log_temperature.exp(), symmetric=True)

    before = retrieval(model, held_out)
    losses = training.train(model.parameters(), loss, options.steps, rate=5e-3)
    figures = {
        "loss at first": losses[0],
        "loss at last": sum(losses[-10:]) / len(losses[-10:]),
        "right line found before": before,
        "right line found": retrieval(model, held_out),
        "by chance": 1 / len(held_out),
        "temperature": model.log_temperature.exp().item(),
    }
    return training.finish("Names and first lines", figures, options)


if __name__ == "__main__":
    main()
