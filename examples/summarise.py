"""Sequence to sequence with attention: a docstring's body and its function's name to its first line.

fastloss.pointer_generator_nll (See et al. 2017, arXiv:1704.04368) mixes words of a small vocabulary with words copied
from the source, which have ids beyond the vocabulary where they are not in it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from parts import text, training
from torch import Tensor, nn

import fastloss

SOURCE, SUMMARY = 60, 14


class Pair(NamedTuple):
    """`source` and `target` with extended ids; `extra` are the source's words outside the vocabulary."""

    source: list[int]
    target: list[int]
    extra: list[str]


def pairs(vocab: int) -> tuple[list[Pair], text.Vocabulary]:
    texts = [
        (text.words(f"{item.name} ( {item.arguments} ) {item.rest}")[:SOURCE], text.words(item.first)[:SUMMARY])
        for item in text.documented()
        if len(item.rest) > 40
    ]
    vocabulary = text.Vocabulary([t for pair in texts for t in pair], vocab)
    return [_pair(source, target, vocabulary) for source, target in texts if target], vocabulary


def _pair(source: list[str], target: list[str], vocabulary: text.Vocabulary) -> Pair:
    extra = list(dict.fromkeys(word for word in source if word not in vocabulary.index))
    ids = {word: len(vocabulary) + i for i, word in enumerate(extra)}
    return Pair(vocabulary.encode(source, ids), [*vocabulary.encode(target, ids), text.END], extra)


class Summariser(nn.Module):
    """A GRU reads, another writes and looks back."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.vocab = vocab
        self.embedding = nn.Embedding(vocab, width, padding_idx=text.PAD)
        self.reader = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        self.writer = nn.GRU(width, width, batch_first=True)
        self.query = nn.Linear(width, width, bias=False)
        self.gate, self.head = nn.Linear(2 * width, 1), nn.Linear(2 * width, vocab)

    def known(self, ids: Tensor) -> Tensor:
        """Words outside the vocabulary have no embedding of their own."""
        return self.embedding(ids.masked_fill(ids >= self.vocab, text.UNKNOWN))

    def forward(self, source: Tensor, written: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits (B, T, vocab), gate's logit (B, T), attention (B, T, S))."""
        memory, last = self.reader(self.known(source))
        states, _ = self.writer(self.known(written), last.transpose(0, 1).flatten(1)[None])
        scores = self.query(states) @ memory.transpose(1, 2)
        attention = scores.masked_fill((source == text.PAD)[:, None], -torch.inf).softmax(-1)
        both = torch.cat([states, attention @ memory], -1)
        return self.head(both), self.gate(both).squeeze(-1), attention


def batch_of(chosen: list[Pair]) -> tuple[Tensor, Tensor, Tensor]:
    """(source, what has been written before each word, the word; beyond the end -100)."""
    source, target = text.padded([p.source for p in chosen]), text.padded([p.target for p in chosen])
    before = torch.cat([torch.full((len(chosen), 1), text.START), target[:, :-1]], 1)
    return source, before, target.masked_fill(target == text.PAD, -100)


def nll(model: Summariser, chosen: list[Pair], **options: float) -> Tensor:
    source, before, target = batch_of(chosen)
    logits, gate, attention = model(source, before)
    return fastloss.pointer_generator_nll(logits, gate, attention, source, target, eps=1e-8, **options)


@torch.no_grad()
def summarise(model: Summariser, pair: Pair, vocabulary: text.Vocabulary) -> str:
    """The likeliest word at each step, generated or copied."""
    source, written = torch.tensor([pair.source]), [text.START]
    for _ in range(SUMMARY):
        logits, gate, attention = (t[0, -1] for t in model(source, torch.tensor([written])))
        p = torch.zeros(len(vocabulary) + len(pair.extra))
        p[: len(vocabulary)] = gate.sigmoid() * logits.softmax(-1)
        p.scatter_add_(0, source[0], (1 - gate.sigmoid()) * attention)
        p[[text.PAD, text.UNKNOWN, text.START]] = 0
        written.append(int(p.argmax()))
        if written[-1] == text.END:
            break
    return vocabulary.decode(written[1:], pair.extra)


def main(argv: list[str] | None = None) -> dict[str, float | str]:
    options = training.begin(training.parser(__doc__, steps=500), argv)
    everything, vocabulary = pairs(options.vocab)
    train, held_out = text.split(everything, 100)
    model = Summariser(len(vocabulary), options.width)

    def loss(step: int) -> Tensor:
        picked = [train[i] for i in torch.randint(len(train), (options.batch,))]
        return nll(model, picked, coverage_weight=0.1)

    with torch.no_grad():
        before = nll(model, held_out).item()
    training.train(model.parameters(), loss, options.steps)
    with torch.no_grad():
        after = nll(model, held_out).item()
    example = next((p for p in held_out if p.extra), held_out[0])
    figures: dict[str, float | str] = {
        "held-out nats per word before": before,
        "held-out nats per word": after,
        "source": vocabulary.decode(example.source, example.extra),
        "first line": vocabulary.decode(example.target, example.extra),
        "summary": summarise(model, example, vocabulary),
    }
    return training.finish("Docstrings to their first lines", figures, options)


if __name__ == "__main__":
    main()
