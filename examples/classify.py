"""Text classification: which package of the standard library does a docstring come from?

Few classes, of very different sizes: class weights even them out, and label smoothing keeps the model from certainty.
"""

from __future__ import annotations

from collections import Counter

import torch
from parts import text, training
from torch import Tensor, nn

import fastloss

CLASSES = 8


def data(vocab: int) -> tuple[list[tuple[list[int], int]], list[str], int]:
    """((word ids, class) of every docstring of the largest packages, their names, the size of the vocabulary)."""
    items = text.documented()
    names = [name for name, _ in Counter(item.package for item in items).most_common(CLASSES)]
    chosen = [item for item in items if item.package in names]
    texts = [text.words(f"{item.first} {item.rest}")[:60] for item in chosen]
    vocabulary = text.Vocabulary(texts, vocab)
    labelled = [
        (vocabulary.encode(t) or [text.PAD], names.index(i.package)) for t, i in zip(texts, chosen, strict=True)
    ]
    return labelled, names, len(vocabulary)


class Classifier(nn.Module):
    """A bag of words, and one hidden layer."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(vocab, width, padding_idx=text.PAD)
        self.layers = nn.Sequential(nn.ReLU(), nn.Linear(width, CLASSES))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.bag(tokens))


def main(argv: list[str] | None = None) -> dict[str, float]:
    options = training.begin(training.parser(__doc__, steps=400, batch=64), argv)
    labelled, names, vocab = data(options.vocab)
    train, held_out = text.split(labelled, 400)
    count = torch.bincount(torch.tensor([y for _, y in train]), minlength=len(names))
    weight = len(train) / (len(names) * count.clamp(min=1).float())
    model = Classifier(vocab, options.width)

    def loss(step: int) -> Tensor:
        picked = [train[i] for i in torch.randint(len(train), (options.batch,))]
        x, y = text.padded([ids for ids, _ in picked]), torch.tensor([y for _, y in picked])
        return fastloss.cross_entropy(model(x), y, weight=weight, label_smoothing=0.05)

    losses = training.train(model.parameters(), loss, options.steps, rate=1e-2)
    x, y = text.padded([ids for ids, _ in held_out]), torch.tensor([y for _, y in held_out])
    with torch.no_grad():
        _, stats = fastloss.cross_entropy(model(x), y, return_stats=True)
    figures = {
        "loss at first": losses[0],
        "loss at last": sum(losses[-10:]) / len(losses[-10:]),
        "accuracy": stats.correct.float().mean().item(),
        "accuracy of the most frequent class": (y == count.argmax()).float().mean().item(),
        "entropy of a prediction, nats": stats.entropy.mean().item(),
    }
    return training.finish(f"Of {len(names)} packages: {', '.join(names)}", figures, options)


if __name__ == "__main__":
    main()
