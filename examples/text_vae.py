"""A variational autoencoder of short texts (Bowman et al. 2016, arXiv:1511.06349): first lines of docstrings.

The loss is each text's negative log-likelihood, summed over its words by fastloss.lm.sequence_cross_entropy, and
fastloss.gaussian_kl of its code, which is let in slowly: from the start it would keep the code empty.
"""

from __future__ import annotations

import torch
from parts import text, training
from torch import Tensor, nn

import fastloss
from fastloss import lm

CODE, LENGTH = 16, 16


class TextVAE(nn.Module):
    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width, padding_idx=text.PAD)
        self.encoder, self.decoder = (nn.GRU(width, width, batch_first=True) for _ in range(2))
        self.mean, self.log_var = nn.Linear(width, CODE), nn.Linear(width, CODE)
        self.start, self.head = nn.Linear(CODE, width), nn.Linear(width, vocab)

    def encode(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        states, _ = self.encoder(self.embedding(tokens))
        last = states[torch.arange(len(tokens)), lengths - 1]
        return self.mean(last), self.log_var(last)

    def decode(self, code: Tensor, written: Tensor) -> Tensor:
        start = torch.tanh(self.start(code))
        # The code is heard at every word, not only at the first.
        states, _ = self.decoder(self.embedding(written) + start[:, None], start[None])
        return self.head(states)


def parts_of(model: TextVAE, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(nats of the words, nats of the code), means over texts."""
    tokens, lengths = text.padded(rows), torch.tensor([len(row) for row in rows])
    mean, log_var = model.encode(tokens, lengths)
    code = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
    written = torch.cat([torch.full((len(rows), 1), text.START), tokens[:, :-1]], 1)
    logits = model.decode(code, written)
    options = {"lengths": lengths, "shift": False, "length_normalised": False}
    return lm.sequence_cross_entropy(logits, tokens, **options), fastloss.gaussian_kl(mean, log_var)


@torch.no_grad()
def sample(model: TextVAE, code: Tensor) -> list[int]:
    """The likeliest words of a code."""
    written = [text.START]
    for _ in range(LENGTH):
        logits = model.decode(code, torch.tensor([written]))[0, -1]
        logits[[text.PAD, text.UNKNOWN, text.START]] = -torch.inf
        written.append(int(logits.argmax()))
        if written[-1] == text.END:
            break
    return written[1:]


def main(argv: list[str] | None = None) -> dict[str, float | str]:
    options = training.begin(training.parser(__doc__, steps=600, batch=32), argv)
    lines = [text.words(item.first)[:LENGTH] for item in text.documented()]
    vocabulary = text.Vocabulary(lines, options.vocab)
    train, held_out = text.split([[*vocabulary.encode(line), text.END] for line in lines if line], 200)
    model = TextVAE(len(vocabulary), options.width)

    def loss(step: int) -> Tensor:
        words, code = parts_of(model, [train[i] for i in torch.randint(len(train), (options.batch,))])
        return words + min(1.0, 2 * step / options.steps) * 0.3 * code

    with torch.no_grad():
        before = sum(t.item() for t in parts_of(model, held_out))
    training.train(model.parameters(), loss, options.steps)
    with torch.no_grad():
        words, code = parts_of(model, held_out)
    figures: dict[str, float | str] = {
        "bound before, nats per text": before,
        "bound, nats per text": (words + code).item(),
        "of the words": words.item(),
        "of the code": code.item(),
        "a text from nowhere": vocabulary.decode(sample(model, torch.randn(1, CODE))),
    }
    return training.finish("A text VAE", figures, options)


if __name__ == "__main__":
    main()
