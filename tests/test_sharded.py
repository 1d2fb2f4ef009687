"""A vocabulary over several ranks: every loss, at any cuts, is what one rank computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, LOSS_CASES, Case
from check import assert_as_good_as_torch as assert_logits_as_good
from linear_calls import Call, assert_as_good_as_torch, results
from ranks import Ranks, ranks
from test_strides import PAIRS, over
from torch import Tensor

import fastloss
from fastloss import VocabShard

ALL = {case.name: case for case in CASES + LOSS_CASES}
CLASSES = ("weight", "target")  # what has a class dimension beside the logits; the target where it has


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def world(request: pytest.FixtureRequest):
    with ranks(request.param) as started:
        yield started


def own(
    case: Case, x: Tensor, y: Tensor, options: dict[str, Any], part: slice
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A rank's part of a case."""
    options = dict(options)
    if options.get("weight") is not None:
        options["weight"] = options["weight"][part]
    return x[:, part], y if case.objective.indexed else y[:, part], options


def on_rank(
    name: str,
    x: Tensor,
    y: Tensor,
    options: dict[str, Any],
    upstream: Tensor | None,
    cuts: list[int],
    views: tuple[str, str] | None,
):
    """Loss and gradient of this rank's logits; through `views` of test_strides.VIEWS of them and of their target."""
    case, rank = ALL[name], torch.distributed.get_rank()
    shard = VocabShard(cuts[rank], cuts[rank + 1], cuts[-1])
    x, y, options = own(case, x, y, options, slice(*cuts[rank : rank + 2]))
    x = x.clone().requires_grad_()
    loss = (over(case, *views) if views else case.loss())(x, y, shard=shard, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), x.grad


class Sharded(torch.autograd.Function):
    """The ranks' loss as a function of all logits."""

    @staticmethod
    def forward(ctx, x, ask):
        ctx.ask, ctx.x = ask, x.detach()
        return ask(x.detach(), None)[0]

    @staticmethod
    def backward(ctx, upstream):
        return ctx.ask(ctx.x, upstream)[1], None


def sharded(world: Ranks, case: Case, cuts: list[int], views: tuple[str, str] | None = None):
    """What a user would call, over ranks."""

    def loss(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        def ask(x: Tensor, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
            found = world.run(on_rank, case.name, x, y, options, upstream, cuts, views)
            for other, _ in found[1:]:
                assert torch.equal(other, found[0][0]), "ranks differ"
            return found[0][0], torch.cat([grad for _, grad in found], 1)

        return Sharded.apply(x, ask)

    return loss


def cut(V: int, ranks: int, g: torch.Generator) -> list[int]:
    """Anywhere, also to parts without classes."""
    return [0, *torch.randint(V + 1, (ranks - 1,), generator=g).sort().values.tolist(), V]


def check(
    world: Ranks,
    case: Case,
    N: int,
    V: int,
    dtype: torch.dtype,
    reduction: str,
    g: torch.Generator,
    views: tuple[str, str] | None = None,
) -> None:
    x, y, options = case.inputs(N, V, dtype, g)
    per_row = case.function == "selective_log_softmax"
    upstream = case.upstream(N, g) if per_row or reduction == "none" else None
    reduction = "sum" if reduction == "none" and "normalizer" in options else reduction
    upstream = None if reduction == "sum" else upstream
    options |= {} if per_row else {"reduction": reduction}
    loss = sharded(world, case, cut(V, len(world.pipes), g), views)
    assert_logits_as_good(loss, case.oracle, x, y, options, upstream)


@pytest.mark.parametrize("name", ALL)
def test_case(world, name, generator):
    case = ALL[name]
    check(world, case, 6, 131, torch.float32, "mean", generator)
    check(world, case, 5, 40, torch.float64, "none", generator)


@pytest.mark.parametrize("name", ALL)
def test_rows_at_two_strides(world, name, generator):
    pairs = PAIRS[: 2 if len(world.pipes) == 2 else 1]
    for views, reduction in zip(pairs, ("mean", "none"), strict=False):
        check(world, ALL[name], 6, 131, torch.float32, reduction, generator, views)


def linear_on_rank(
    name: str, sizes: tuple[int, int, torch.dtype], seed: int, upstream: Any, more: Any, cuts: list[int]
):
    """Loss and gradients of the hidden states and of this rank's part of the head."""
    rank, call = torch.distributed.get_rank(), Call(ALL[name], *sizes, torch.Generator().manual_seed(seed))
    start, stop = cuts[rank : rank + 2]
    own = call.of_classes(slice(start, stop))
    return results(own.ours, own.head, upstream, shard=VocabShard(start, stop, cuts[-1]), **more)


@pytest.mark.parametrize("name", ALL)
def test_linear_case(world, name, generator):
    case = ALL[name]
    for seed, (N, V, dtype, reduction) in enumerate(((9, 131, torch.float32, "mean"), (5, 40, torch.bfloat16, "none"))):
        call = Call(case, N, V, dtype, torch.Generator().manual_seed(seed))
        per_row = case.function == "selective_log_softmax"
        if reduction == "none" and "normalizer" in call.options:
            reduction = "sum"
        upstream = case.upstream(N, generator) if per_row or reduction == "none" else None
        more = {} if per_row else {"reduction": reduction}
        cuts = cut(V, len(world.pipes), generator)
        found = world.run(linear_on_rank, name, (N, V, dtype), seed, upstream, more, cuts)
        for other in found[1:]:
            assert torch.equal(other[0], found[0][0]) and torch.equal(other[1], found[0][1]), "ranks differ"
        got = [*found[0][:2], *(torch.cat([grads[k] for grads in found]) for k in (2, 3))]
        assert_as_good_as_torch(call, upstream, got, **more)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(world, dtype, generator):
    for name in ("index", "smoothing_weight", "probabilities", "reverse_kl", "js", "topk_tail", "log_probs"):
        check(world, ALL[name], 6, 131, dtype, "none", generator)


def pairs_on_rank(name: str, options: dict[str, Any], cuts: list[int], upstream: Tensor | None) -> list[Tensor]:
    rank, g = torch.distributed.get_rank(), torch.Generator().manual_seed(11)
    part = slice(*cuts[rank : rank + 2])
    query, key = (torch.randn(cuts[-1], 12, generator=g)[part].clone().requires_grad_() for _ in range(2))
    temperature = torch.tensor(0.4, requires_grad=True)
    if "token_weight" in options:
        options["token_weight"] = options["token_weight"][part]
    shard = VocabShard(part.start, part.stop, cuts[-1])
    loss = getattr(fastloss, name)(query, key, temperature=temperature, shard=shard, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return [loss.detach(), query.grad, key.grad, temperature.grad]


@pytest.mark.parametrize("name", ["info_nce", "linear_info_nce"])
@pytest.mark.parametrize("options", [{}, {"symmetric": True, "label_smoothing": 0.1}, {"reduction": "none"}], ids=str)
def test_contrast_over_the_batch_of_all_ranks(world, name, options, generator):
    N = 9
    options = {**options, "token_weight": torch.rand(N, generator=generator)}
    upstream = torch.rand(N, generator=generator) if "reduction" in options else None
    found = world.run(pairs_on_rank, name, options, cut(N, len(world.pipes), generator), upstream)
    g = torch.Generator().manual_seed(11)
    query, key = (torch.randn(N, 12, generator=g).requires_grad_() for _ in range(2))
    temperature = torch.tensor(0.4, requires_grad=True)
    want = fastloss.info_nce(query, key, temperature=temperature, **options)
    want.backward(torch.ones_like(want) if upstream is None else upstream)
    torch.testing.assert_close(found[0][0], want.detach())
    torch.testing.assert_close(torch.cat([f[1] for f in found]), query.grad)
    torch.testing.assert_close(torch.cat([f[2] for f in found]), key.grad)
    torch.testing.assert_close(sum(f[3] for f in found), temperature.grad)


def summarised_on_rank(cuts: list[int]) -> list[Tensor]:
    rank, V = torch.distributed.get_rank(), cuts[-1]
    x, *rest = pointer_arguments(V)
    part = slice(*cuts[rank : rank + 2])
    x = x[..., part].clone().requires_grad_()
    loss = fastloss.pointer_generator_nll(x, *rest, shard=VocabShard(part.start, part.stop, V))
    loss.backward()
    return [loss.detach(), x.grad]


def pointer_arguments(V: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    attention = torch.rand(2, 3, 6, generator=g).softmax(-1)
    source, target = torch.randint(V + 3, (2, 6), generator=g), torch.randint(V, (2, 3), generator=g)
    target[0, 0], target[1, 1] = -100, source[1, 2]
    return [torch.randn(2, 3, V, generator=g), torch.randn(2, 3, generator=g), attention, source, target]


def test_pointer_generator(world, generator):
    x, *rest = pointer_arguments(31)
    x.requires_grad_()
    want = fastloss.pointer_generator_nll(x, *rest)
    want.backward()
    found = world.run(summarised_on_rank, cut(31, len(world.pipes), generator))
    torch.testing.assert_close(found[0][0], want.detach())
    torch.testing.assert_close(torch.cat([f[1] for f in found], -1), x.grad)
