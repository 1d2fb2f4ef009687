"""A policy-gradient step as in GRPO (Shao et al. 2024, arXiv:2402.03300) on a toy reward: texts with many vowels.

A language model of characters is trained on docstrings, then rewarded. The log-likelihoods of the sampled tokens and
the entropy come from one pass of fastloss.selective_log_softmax; PPO's clipped ratio and the KL to the reference model
(the k3 estimate, equation 4) are plain torch on vectors.
"""

from __future__ import annotations

import copy

import torch
from parts import text, training
from parts.models import LanguageModel, Recurrent, generate
from torch import Tensor, nn

import fastloss
from fastloss import lm

CONTEXT, LENGTH, CLIP, KL_WEIGHT = 48, 24, 0.2, 0.02
ALPHABET = " abcdefghijklmnopqrstuvwxyz.,'"
VOWELS = torch.tensor([ALPHABET.index(c) for c in "aeiou"])


def characters() -> Tensor:
    joined = " ".join(item.first.lower() for item in text.documented())
    return torch.tensor([ALPHABET.index(c) for c in joined if c in ALPHABET])


def rewards(answers: Tensor) -> Tensor:
    """The share of vowels, (B,)."""
    return torch.isin(answers, VOWELS).float().mean(1)


def log_probs(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of the sampled tokens, (B, LENGTH), and the entropies that they were drawn from."""
    logits = model(tokens[:, :-1])[:, -LENGTH:]
    return fastloss.selective_log_softmax(logits, tokens[:, -LENGTH:], return_entropy=True)


def objective(new: Tensor, old: Tensor, reference: Tensor, advantage: Tensor) -> Tensor:
    """To be minimised: PPO's clipped surrogate, and k3 = r - 1 - log r of r = reference / policy."""
    ratio = (new - old).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    difference = reference - new
    k3 = difference.exp() - 1 - difference
    return (KL_WEIGHT * k3 - surrogate).mean()


def main(argv: list[str] | None = None) -> dict[str, float | str]:
    made = training.parser(__doc__, steps=120, batch=8)
    made.add_argument("--group", type=int, default=16, help="answers to each prompt")
    made.add_argument("--pretraining", type=int, default=300, help="steps on the text itself")
    options = training.begin(made, argv)
    data = characters()
    policy = LanguageModel(Recurrent("gru", len(ALPHABET), options.width), len(ALPHABET), options.width)

    def pretrain(step: int) -> Tensor:
        batch = text.windows(data, 32, CONTEXT)
        return lm.causal_lm_loss(policy(batch), batch)

    training.train(policy.parameters(), pretrain, options.pretraining, rate=5e-3, name="on text")
    reference = copy.deepcopy(policy).requires_grad_(False)
    history: list[tuple[float, float]] = []
    kept: dict[str, Tensor] = {}

    def reinforce(step: int) -> Tensor:
        if step % 2 == 0:  # two steps on the same answers: the second is where the ratio leaves one
            prompts = text.windows(data, options.batch, 12).repeat_interleave(options.group, 0)
            tokens = generate(policy, prompts, LENGTH, CONTEXT)
            reward = rewards(tokens[:, -LENGTH:])
            groups = reward.view(-1, options.group)
            advantage = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
            with torch.no_grad():
                old, entropy = log_probs(policy, tokens)
                kept.update(tokens=tokens, old=old, reference=log_probs(reference, tokens)[0])
            kept["advantage"] = advantage.view(-1, 1)
            history.append((reward.mean().item(), entropy.mean().item()))
        new, _ = log_probs(policy, kept["tokens"])
        return objective(new, kept["old"], kept["reference"], kept["advantage"])

    training.train(policy.parameters(), reinforce, options.steps, name="on rewards")
    written = generate(policy, text.windows(data, 1, 12), LENGTH, CONTEXT)[0].tolist()
    last = history[-5:]
    figures: dict[str, float | str] = {
        "reward at first": history[0][0],
        "reward at last": sum(reward for reward, _ in last) / len(last),
        "entropy at first": history[0][1],
        "entropy at last": sum(entropy for _, entropy in last) / len(last),
        "writes": "".join(ALPHABET[i] for i in written),
    }
    return training.finish("GRPO, rewarded for vowels", figures, options)


if __name__ == "__main__":
    main()
