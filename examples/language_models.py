"""Three language models, an RNN, an LSTM and a transformer: trained, measured by their perplexity, and let write.

fastloss.lm.causal_lm_loss shifts the labels instead of copying the logits; fastloss.lm.Perplexity is exact over a
corpus that comes in batches, and sliding windows give every token its context.
"""

from __future__ import annotations

import torch
from parts import text, training
from parts.models import LanguageModel, Recurrent, Transformer, generate
from torch import Tensor, nn

from fastloss import lm

CONTEXT = 64
KINDS = ("rnn", "lstm", "transformer")


def build(kind: str, vocab: int, width: int) -> LanguageModel:
    body = Transformer(vocab, width, CONTEXT) if kind == "transformer" else Recurrent(kind, vocab, width)
    return LanguageModel(body, vocab, width)


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    """Of one long text, each token scored once, with at least half a window before it."""
    inputs, labels = lm.sliding_windows(tokens, CONTEXT, CONTEXT // 2)
    batches = zip(inputs.split(32), labels.split(32), strict=True)
    return lm.perplexity((model(x), y) for x, y in batches).item()


def main(argv: list[str] | None = None) -> dict[str, float | str]:
    made = training.parser(__doc__, steps=250)
    made.add_argument("--model", choices=(*KINDS, "all"), default="all")
    options = training.begin(made, argv)
    train, held_out = text.split(text.documents(), 200)
    vocabulary = text.Vocabulary(train, options.vocab)
    tokens, unseen = (text.token_stream(part, vocabulary) for part in (train, held_out))
    figures: dict[str, float | str] = {}
    for kind in KINDS if options.model == "all" else (options.model,):
        torch.manual_seed(options.seed)
        model = build(kind, len(vocabulary), options.width)
        figures[f"{kind}: perplexity before"] = perplexity(model, unseen)

        def loss(step: int, model: nn.Module = model) -> Tensor:
            batch = text.windows(tokens, options.batch, CONTEXT)
            return lm.causal_lm_loss(model(batch), batch)

        training.train(model.parameters(), loss, options.steps, name=kind)
        figures[f"{kind}: perplexity"] = perplexity(model, unseen)
        prompt = torch.tensor([vocabulary.encode(["return", "the"])])
        written = generate(model, prompt, 20, CONTEXT, temperature=0.7)[0].tolist()
        figures[f"{kind} writes"] = vocabulary.decode(written)
    return training.finish("Language models", figures, options)


if __name__ == "__main__":
    main()
