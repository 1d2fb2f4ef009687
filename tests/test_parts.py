"""A vocabulary in parts equals the whole one, on every engine. Ranks are threads of one process, so that engines which
exist in it alone can compute their parts. test_any_cut.py cuts it anywhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from cases import CASES, LOSS_CASES, Case
from check import assert_as_good_as_torch as assert_logits_as_good
from engines import ISAS, on_engine
from linear_calls import Call, assert_as_good_as_torch, results
from test_sharded import Sharded
from torch import Tensor

import fastloss
from fastloss import VocabShard
from fastloss.linear import sharded as heads
from fastloss.parallel import rows as sharded
from fastloss.parallel import shard as sharding

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = [*CASES, *LOSS_CASES]
ENGINES = [*ISAS, "cuda:host", "triton:ptx"]
CUTS = [0, 50, 50, 131], [0, 40, 64, 131], [0, 50, 131]


@contextmanager
def threads_as_ranks(size: int) -> Iterator[Callable[[Callable[[int], Any]], list[Any]]]:
    """What runs a function of the rank on all of them. What ranks gather they leave in a list; kernels take turns."""
    barrier, box, kernels = threading.Barrier(size, timeout=600), [None] * size, threading.RLock()
    mine = threading.local()

    def gathered(block: Tensor, _: VocabShard) -> Tensor:
        box[mine.rank] = block
        barrier.wait()
        everyone = torch.stack(list(box))
        barrier.wait()
        return everyone

    def in_turn(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with kernels:
                return function(*args)

        return call

    def run(function: Callable[[int], Any]) -> list[Any]:
        def on(rank: int) -> Any:
            mine.rank = rank
            try:
                return function(rank)
            except BaseException:
                barrier.abort()
                raise

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(on, range(size)))

    launches = [(sharded, "call_row_loss"), (sharded, "call_row_grad"), (heads, "_compute"), (heads, "_head_grads")]
    with ExitStack() as stack:
        for module, name in launches:
            stack.enter_context(patch.object(module, name, in_turn(getattr(module, name))))
        stack.enter_context(patch.object(sharding, "_gathered", gathered))
        stack.enter_context(patch.object(VocabShard, "ranks", size))
        stack.enter_context(patch.object(VocabShard, "group_name", ""))
        yield run


def value_and_grad(
    case: Case, x: Tensor, y: Tensor, options: dict[str, Any], upstream: Tensor | None
) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    loss = case.loss()(x, y, **options)
    (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
    return loss.detach(), grad


def in_parts(
    case: Case, x: Tensor, y: Tensor, options: dict[str, Any], upstream: Tensor | None, cuts: list[int]
) -> tuple[Tensor, Tensor]:
    """As ranks of a part each compute it."""

    def on_rank(rank: int) -> tuple[Tensor, Tensor]:
        part, own = slice(*cuts[rank : rank + 2]), dict(options)
        if own.get("weight") is not None:
            own["weight"] = own["weight"][part]
        own["shard"] = VocabShard(part.start, part.stop, cuts[-1])
        return value_and_grad(case, x[:, part], y if case.objective.indexed else y[:, part], own, upstream)

    with threads_as_ranks(len(cuts) - 1) as run:
        found = run(on_rank)
    for loss, _ in found[1:]:
        assert torch.equal(loss, found[0][0])
    return found[0][0], torch.cat([grad for _, grad in found], 1)


def reduction_of(case: Case, options: dict[str, Any]) -> dict[str, str]:
    """None, where there is a choice."""
    if case.function == "selective_log_softmax":
        return {}
    return {"reduction": "sum" if "normalizer" in options else "none"}


def check(case: Case, N: int, V: int, cuts: list[int], g: torch.Generator) -> None:
    x, y, options = case.inputs(N, V, torch.float32, g)
    options |= reduction_of(case, options)
    upstream = torch.ones(()) if "normalizer" in options else case.upstream(N, g)
    want = value_and_grad(case, x, y, options, upstream)
    got = in_parts(case, x, y, options, upstream, cuts)
    for name, a, b in zip(("loss", "gradient"), got, want, strict=True):
        scale = float(b.nan_to_num(posinf=0, neginf=0).abs().max().clamp(min=1))
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * scale, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def check_exactly(case: Case, N: int, cuts: list[int], dtype: torch.dtype, g: torch.Generator) -> None:
    """Against float64 of the whole vocabulary."""
    x, y, options = case.inputs(N, cuts[-1], dtype, g)
    upstream = None if "normalizer" in options else case.upstream(N, g)
    options |= reduction_of(case, options)

    def loss(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        return Sharded.apply(x, lambda x, upstream: in_parts(case, x, y, options, upstream, cuts))

    assert_logits_as_good(loss, case.oracle, x, y, options, upstream, noise=5e-7)  # parts round, and their sum


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ENGINES)
def test_every_engine(name, case, generator):
    with on_engine(name):
        check_exactly(case, 4, CUTS[ALL.index(case) % len(CUTS)], torch.float32, generator)


@pytest.mark.parametrize("name", ["everything", "js_squashed", "topk_tail_squashed"])
def test_long_parts_on_triton(name, generator):
    """Of which one is cut into slices."""
    case = next(case for case in ALL if case.name == name)
    with on_engine("triton:ptx"):
        check_exactly(case, 2, [0, 40000, 41000], torch.float32, generator)


def check_heads(case: Case, N: int, cuts: list[int], dtype: torch.dtype, g: torch.Generator) -> None:
    """The same of hidden states, to whose gradient each rank adds its part."""
    call = Call(case, N, cuts[-1], dtype, g)
    upstream, more = None if "normalizer" in call.options else case.upstream(N, g), reduction_of(case, call.options)

    def on_rank(rank: int) -> list[Tensor]:
        start, stop = cuts[rank : rank + 2]
        own = call.of_classes(slice(start, stop))
        return results(own.ours, own.head, upstream, shard=VocabShard(start, stop, cuts[-1], None, False), **more)

    with threads_as_ranks(len(cuts) - 1) as run:
        found = run(on_rank)
    hidden = sum(grads[1].double() for grads in found)
    got = [found[0][0], hidden, *(torch.cat([grads[k] for grads in found]) for k in (2, 3))]
    assert_as_good_as_torch(call, upstream, got, **more)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ENGINES)
def test_heads_on_every_engine(name, case, generator):
    turn = ALL.index(case)
    with on_engine(name):
        check_heads(case, 9, CUTS[turn % len(CUTS)], torch.bfloat16 if turn % 4 == 0 else torch.float32, generator)


def test_a_part_of_no_classes_of_sequences(generator):
    """Logits (B, S, 0): how many rows they are, no division says."""
    x, y = (torch.randn(2, 3, 7, generator=generator) for _ in range(2))

    def on_rank(rank: int) -> Tensor:
        part = slice(0, 7 * rank)
        return fastloss.kl_div_with_logits(x[..., part], y[..., part], shard=VocabShard(part.start, part.stop, 7))

    with threads_as_ranks(2) as run:
        found = run(on_rank)
    torch.testing.assert_close(found[0], fastloss.kl_div_with_logits(x, y))
