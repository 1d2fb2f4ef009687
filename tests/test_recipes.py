"""docs/recipes.md, executed: every function against the textbook's expression over softmaxes, in float64."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
N, T, V = 8, 6, 13


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's code defines."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, names)
    return names


@pytest.fixture
def x(generator: torch.Generator) -> Tensor:
    return torch.randn(N, T, V, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.fixture
def y(generator: torch.Generator) -> Tensor:
    return torch.randint(V, (N, T), generator=generator)


def chosen(x: Tensor, y: Tensor) -> Tensor:
    """Probabilities of the labels."""
    return x.softmax(-1).gather(-1, y[..., None]).squeeze(-1)


def entropy(x: Tensor) -> Tensor:
    p = x.softmax(-1)
    return -(p * p.log()).sum(-1)


def same(got: Tensor, want: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


def test_focal(page, x, y):
    for gamma in 0.5, 2.0:
        p = chosen(x, y)
        same(page["focal_loss"](x, y, gamma), (-((1 - p) ** gamma) * p.log()).mean(), x)


def test_unlikelihood(page, x, generator):
    negatives = torch.randint(V, (N, T, 3), generator=generator)
    want = -(1 - x.softmax(-1).gather(-1, negatives)).log().sum(-1).mean()
    same(page["unlikelihood_loss"](x, negatives), want, x)
    certain = torch.zeros(1, 1, 3).index_fill(-1, torch.tensor([0]), 200.0)
    assert page["unlikelihood_loss"](certain, torch.zeros(1, 1, 1, dtype=torch.int64)).isfinite()


def test_confidence_penalty(page, x, y):
    want = F.cross_entropy(x.flatten(0, 1), y.flatten()) - 0.1 * entropy(x).mean()
    same(page["confidence_penalty"](x, y), want, x)


def test_top_k_accuracy(page, x, y):
    for k in 1, 5, V:
        want = (x.topk(k).indices == y[..., None]).any(-1).float().mean()
        assert page["top_k_accuracy"](x, y, k) == want


def test_dpo(page, x, y):
    other = (x.detach().flip(0) * 0.7).requires_grad_()
    reference = torch.randn(2, N, dtype=torch.float64)
    likelihood = [chosen(t[:, :-1], z[:, 1:]).log().sum(1) for t, z in ((x, y), (other, y.flip(1)))]
    better, worse = (a - b for a, b in zip(likelihood, reference, strict=True))
    want = -torch.sigmoid(0.1 * (better - worse)).log().mean()
    same(page["dpo_loss"](x, y, other, y.flip(1), *reference), want, x, other)


def test_kl_estimates(page, generator):
    """Over all tokens, weighted by the policy, k1 and k3 are the divergence itself; k2 is near it for near policies."""
    a, b = (torch.randn(V, generator=generator, dtype=torch.float64).mul(0.3).log_softmax(0) for _ in range(2))
    exact = (a.exp() * (a - b)).sum()
    k1, k2, k3 = page["kl_estimates"](a, b)
    torch.testing.assert_close((a.exp() * k1).sum(), exact)
    torch.testing.assert_close((a.exp() * k2).sum(), exact, rtol=0.2, atol=0)
    torch.testing.assert_close((a.exp() * k3).sum(), exact)
    assert (k3 >= 0).all()


def test_ppo(page, x, y, generator):
    old = chosen(x, y).detach().log() + 0.4 * torch.randn(N, T, generator=generator, dtype=torch.float64)
    advantage = torch.randn(N, T, generator=generator, dtype=torch.float64)
    ratio = chosen(x, y) / old.exp()
    clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    assert 0.1 < (ratio.clamp(0.8, 1.2) != ratio).double().mean() < 0.9
    want = -(clipped + 0.01 * entropy(x)).mean()
    same(page["ppo_loss"](x, y, old, advantage, entropy_weight=0.01), want, x)


def test_grpo(page, x, y, generator):
    old, reference = (
        chosen(x, y).detach().log() + 0.3 * torch.randn(N, T, generator=generator, dtype=torch.float64) for _ in "ab"
    )
    rewards = torch.rand(N, generator=generator, dtype=torch.float64)
    mask = (torch.arange(T) < torch.randint(1, T + 1, (N, 1), generator=generator)).double()
    losses = []
    for group in range(0, N, 4):
        r = rewards[group : group + 4]
        for i in range(group, group + 4):
            advantage = (rewards[i] - r.mean()) / (r.std() + 1e-4)
            tokens = []
            for t in range(int(mask[i].sum())):
                p = x[i, t].softmax(0)[y[i, t]]
                ratio, back = p / old[i, t].exp(), reference[i, t].exp() / p
                surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                tokens.append(0.04 * (back - 1 - back.log()) - surrogate)
            losses.append(torch.stack(tokens).mean())
    want = torch.stack(losses).mean()
    same(page["grpo_loss"](x, y, mask, rewards, old, reference, group=4), want, x)
