"""Process groups that are handed over where no default group exists: every loss over two ranks is that of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import GROUPS, Ranks, ranks
from torch import Tensor

import fastloss
from fastloss import VocabShard, lm
from fastloss.integrations import megatron

N, V, H = 6, 104, 16
KINDS = ["bare backend", "unnamed group"]


@pytest.fixture(scope="module")
def two():
    with ranks(2, default=False) as started:
        yield started


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes() -> Tensor:
    y = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    y[2] = -100
    return y


def whole(leaf: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    leaf = leaf.clone().requires_grad_()
    value = loss(leaf)
    value.sum().backward()
    return value.detach(), leaf.grad


def agree(found: list[tuple[Tensor, Tensor]], want: tuple[Tensor, Tensor], dim: int) -> None:
    for loss, _ in found:
        torch.testing.assert_close(loss, want[0], check_dtype=False)
    torch.testing.assert_close(torch.cat([grad for _, grad in found], dim), want[1])


def shard_of(kind: str) -> VocabShard:
    assert not dist.is_initialized()
    return VocabShard.even(V, GROUPS[kind])


def part(x: Tensor, shard: VocabShard, dim: int) -> Tensor:
    return x.narrow(dim, shard.start, shard.stop - shard.start).clone().requires_grad_()


def dense(kind: str, options: dict[str, Any], compiled: bool) -> tuple[Tensor, Tensor]:
    shard = shard_of(kind)
    x = part(numbers(N, V), shard, 1)
    f = (
        torch.compile(fastloss.cross_entropy, fullgraph=True, backend="aot_eager")
        if compiled
        else fastloss.cross_entropy
    )
    loss = f(x, classes(), shard=shard, **options)
    loss.sum().backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"reduction": "none", "label_smoothing": 0.1}], ids=["mean", "none"])
@pytest.mark.parametrize("compiled", [False, True])
def test_logits(two: Ranks, kind: str, options: dict[str, Any], compiled: bool) -> None:
    want = whole(numbers(N, V), lambda x: F.cross_entropy(x, classes(), **options))
    agree(two.run(dense, kind, options, compiled), want, 1)


def linear(kind: str, compiled: bool) -> tuple[Tensor, Tensor, Tensor]:
    shard, hidden = shard_of(kind), numbers(N, H, seed=2).requires_grad_()
    weight = part(numbers(V, H), shard, 0)
    f = fastloss.linear_cross_entropy
    f = torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f
    loss = f(hidden, weight, classes(), shard=shard)
    loss.backward()
    return loss.detach(), weight.grad, hidden.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_hidden_states(two: Ranks, kind: str, compiled: bool) -> None:
    hidden = numbers(N, H, seed=2)
    want = whole(numbers(V, H), lambda w: F.cross_entropy(hidden @ w.T, classes()))
    found = two.run(linear, kind, compiled)
    agree([f[:2] for f in found], want, 0)
    _, grad = whole(hidden, lambda h: F.cross_entropy(h @ numbers(V, H).T, classes()))
    for f in found:
        torch.testing.assert_close(f[2], grad)


def wrapped(kind: str, name: str) -> tuple[Tensor, Tensor]:
    shard = shard_of(kind)
    x = part(numbers(N, 1, V), shard, 2)
    group = {"parallel_cross_entropy": "dist_process_group", "vocab_parallel_cross_entropy": "tp_group"}[name]
    loss = getattr(megatron, name)(x, classes()[:, None], **{group: GROUPS[kind]})
    loss.sum().backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vocab_parallel_cross_entropy", "parallel_cross_entropy"])
def test_megatron(two: Ranks, kind: str, name: str) -> None:
    want = whole(numbers(N, 1, V), lambda x: F.cross_entropy(x[:, 0], classes(), reduction="none")[:, None])
    agree(two.run(wrapped, kind, name), want, 2)


def corpus(kind: str) -> Tensor:
    group = GROUPS[kind]
    stream = lm.Perplexity()
    if group.rank() == 0:
        stream.update(numbers(1, N, V), classes()[None])
    else:
        stream.update(numbers(1, N, V, seed=3), classes()[None])
    return stream.all_reduce(group).compute()


@pytest.mark.parametrize("kind", KINDS)
def test_perplexity(two: Ranks, kind: str) -> None:
    batches = [numbers(N, V), numbers(N, V, seed=3)]
    want = torch.cat([F.cross_entropy(x[:-1], classes()[1:], reduction="none") for x in batches]).sum() / (2 * N - 4)
    for found in two.run(corpus, kind):
        torch.testing.assert_close(found, want.exp())


def contrastive(kind: str, name: str) -> tuple[Tensor, Tensor]:
    shard = VocabShard.even(N, GROUPS[kind])
    query = part(numbers(N, H), shard, 0)
    loss = getattr(fastloss, name)(query, part(numbers(N, H, seed=4), shard, 0), symmetric=True, shard=shard)
    loss.backward()
    return loss.detach(), query.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["info_nce", "linear_info_nce"])
def test_info_nce(two: Ranks, kind: str, name: str) -> None:
    def loss(query: Tensor) -> Tensor:
        logits = F.normalize(query, dim=-1) @ F.normalize(numbers(N, H, seed=4), dim=-1).T / 0.07
        return (F.cross_entropy(logits, torch.arange(N)) + F.cross_entropy(logits.T, torch.arange(N))) / 2

    agree(two.run(contrastive, kind, name), whole(numbers(N, H), loss), 0)


def said(kind: str) -> tuple[Any, ...]:
    shard, group = shard_of(kind), GROUPS[kind]
    again = VocabShard(shard.start, shard.stop, V, group)
    return (
        shard.start,
        shard.stop,
        shard.ranks,
        shard.group is group,
        again.group_name == shard.group_name,
        again == shard,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_says_its_own_rank(two: Ranks, kind: str) -> None:
    assert two.run(said, kind) == [(0, V // 2, 2, True, True, True), (V // 2, V, 2, True, True, True)]


@pytest.mark.parametrize("group", [-100, "tp", [0, 1]])
def test_not_a_group(group: Any) -> None:
    """-100 is what torch gives ranks that a new group leaves out."""
    for make in (lambda: VocabShard(0, 4, 8, group), lambda: VocabShard.even(8, group)):
        with pytest.raises(TypeError, match="group: expected"):
            make()
