"""Megatron's and TransformerEngine's signatures, against the formulas that they mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import ranks
from torch import Tensor

from fastloss.integrations.megatron import parallel_cross_entropy, vocab_parallel_cross_entropy

S, B, V, EPS = 5, 2, 103, 0.1


@pytest.fixture(scope="module")
def two():
    with ranks(2) as started:
        yield started


def logits(classes: int) -> Tensor:
    x = torch.full((S, B, classes), 1e4)
    x[..., :V] = torch.randn(S, B, V, generator=torch.Generator().manual_seed(0)) * 3
    return x


def labels() -> Tensor:
    y = torch.randint(V, (S, B), generator=torch.Generator().manual_seed(1))
    y[1, 0] = -100
    return y


def called(name: str, classes: int, options: dict[str, Any]) -> list[Tensor]:
    rank, function = dist.get_rank(), globals()[name]
    x = logits(classes)[..., rank * classes // 2 : (rank + 1) * classes // 2].clone().requires_grad_()
    group = {"dist_process_group": dist.group.WORLD} if name == "parallel_cross_entropy" else {}
    loss = function(x, labels(), **options, **group)
    loss.sum().backward()
    return [loss.detach(), x.grad]


def expected(eps: float, reduce: bool = False, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    x, y = logits(V).requires_grad_(), labels().flatten()
    loss = F.cross_entropy(x.flatten(0, 1), y, label_smoothing=eps, reduction="none")
    loss = loss + torch.where(y != -100, z_loss * x.flatten(0, 1).logsumexp(-1) ** 2, 0)
    loss = loss.sum() / (y != -100).sum() if reduce else loss.view(S, B)
    loss.sum().backward()
    return loss.detach(), x.grad


def check(found: list[list[Tensor]], want: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0][0], found[1][0]), "ranks differ"
    torch.testing.assert_close(found[0][0], want[0])
    grad = torch.cat([f[1] for f in found], -1)
    torch.testing.assert_close(grad[..., :V], want[1])
    assert (grad[..., V:] == 0).all()


@pytest.mark.parametrize("convention", ["torch", "megatron"])
def test_megatron(two, convention):
    options = {"label_smoothing": EPS, "smoothing_convention": convention, "vocab_size": V}
    eps = EPS if convention == "torch" else EPS * V / (V - 1)
    check(two.run(called, "vocab_parallel_cross_entropy", 128, options), expected(eps))


def test_megatrons_formula(two):
    """(1 - s) nll - s mean(log p), s = eps K / (K - 1), with the whole vocabulary as K."""
    x = logits(104)[..., :104]
    log_p = x.log_softmax(-1)
    s, y = EPS * 104 / 103, labels()
    nll = -log_p.gather(-1, y.clamp(min=0)[..., None])[..., 0]
    want = torch.where(y == -100, 0, (1 - s) * nll - s * log_p.mean(-1))
    found = two.run(called, "vocab_parallel_cross_entropy", 104, {"label_smoothing": EPS})
    torch.testing.assert_close(found[0][0], want)


@pytest.mark.parametrize("reduce", [False, True])
def test_transformer_engine(two, reduce):
    options = {"label_smoothing": EPS, "reduce_loss": reduce, "z_loss_weight": 1e-3, "vocab_size": V}
    check(two.run(called, "parallel_cross_entropy", 128, options), expected(EPS, reduce, 1e-3))


def test_without_ranks():
    x, y = logits(V), labels()
    torch.testing.assert_close(parallel_cross_entropy(x, y), expected(0.0)[0])
    nothing = torch.full_like(y, -100)
    assert parallel_cross_entropy(x, nothing, reduce_loss=True) == 0
    with pytest.raises(ValueError, match="smoothing_convention: expected one of torch, megatron"):
        vocab_parallel_cross_entropy(x, y, smoothing_convention="fairseq")
