"""Knowledge distillation: a small language model learns a larger one's distributions.

By forward KL, reverse KL, the generalised Jensen-Shannon divergence, or from the teacher's stored top 16 probabilities
with the rest lumped together: no softmax over the vocabulary is materialised in any of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from parts import text, training
from parts.models import LanguageModel, Transformer
from torch import Tensor, nn

import fastloss
from fastloss import lm

CONTEXT, K = 48, 16


def topk(student: Tensor, teacher: Tensor) -> Tensor:
    """As from disk: K indices and probabilities of each token."""
    probs, indices = teacher.softmax(-1).topk(K)
    return fastloss.topk_kl_div(student, indices, probs, tail="lump")


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward": fastloss.kl_div_with_logits,
    "reverse": lambda student, teacher: fastloss.kl_div_with_logits(student, teacher, direction="reverse"),
    "js": lambda student, teacher: fastloss.js_div_with_logits(student, teacher, beta=0.5),
    "topk": topk,
}


def build(vocab: int, width: int, layers: int) -> LanguageModel:
    return LanguageModel(Transformer(vocab, width, CONTEXT, layers), vocab, width)


def main(argv: list[str] | None = None) -> dict[str, float]:
    made = training.parser(__doc__, steps=200)
    made.add_argument("--loss", choices=(*LOSSES, "all"), default="all")
    options = training.begin(made, argv)
    train, held_out = text.split(text.documents(), 200)
    vocabulary = text.Vocabulary(train, options.vocab)
    tokens, unseen = (text.token_stream(part, vocabulary) for part in (train, held_out))
    teacher = build(len(vocabulary), options.width, layers=3)

    def teach(step: int) -> Tensor:
        batch = text.windows(tokens, options.batch, CONTEXT)
        return lm.causal_lm_loss(teacher(batch), batch)

    training.train(teacher.parameters(), teach, options.steps, name="teacher")
    teacher.requires_grad_(False)
    test = text.windows(unseen, 64, CONTEXT)
    answers = teacher(test)
    figures = {"teacher: nats per token": lm.causal_lm_loss(answers, test).item()}
    for name in LOSSES if options.loss == "all" else (options.loss,):
        torch.manual_seed(options.seed)
        student = build(len(vocabulary), options.width // 2, layers=1)

        def learn(step: int, student: nn.Module = student, loss: Callable = LOSSES[name]) -> Tensor:
            batch = text.windows(tokens, options.batch, CONTEXT)
            return loss(student(batch), teacher(batch))

        with torch.no_grad():
            figures[f"{name}: KL to the teacher before"] = fastloss.kl_div_with_logits(student(test), answers).item()
        training.train(student.parameters(), learn, options.steps, name=name)
        with torch.no_grad():
            logits = student(test)
        figures[f"{name}: KL to the teacher"] = fastloss.kl_div_with_logits(logits, answers).item()
        figures[f"{name}: nats per token"] = lm.causal_lm_loss(logits, test).item()
    return training.finish("Distillation", figures, options)


if __name__ == "__main__":
    main()
