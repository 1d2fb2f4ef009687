"""Any cut of the vocabulary equals no cut: found by hypothesis, on every engine. Ranks are threads of one process, so
that engines which exist in it alone can compute their parts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import CASES, LOSS_CASES, Case
from engines import ISAS, on_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastloss
from fastloss import VocabShard
from fastloss.parallel import rows as sharded

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = [*CASES, *LOSS_CASES]
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


@contextmanager
def threads_as_ranks(size: int) -> Iterator[Callable[[Callable[[int], Any]], list[Any]]]:
    """What runs a function of the rank on all of them. What ranks gather they leave in a list; kernels take turns."""
    barrier, box, kernels = threading.Barrier(size, timeout=60), [None] * size, threading.RLock()
    mine, before = threading.local(), (sharded.gather, VocabShard.ranks, sharded.call_row_loss, sharded.call_row_grad)

    def gather(fields: dict[str, Tensor], *_: Any) -> dict[str, Tensor]:
        box[mine.rank] = fields
        barrier.wait()
        everyone = {name: torch.stack([found[name] for found in box]) for name in fields}
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

    sharded.gather, VocabShard.ranks = gather, property(lambda _: size)
    sharded.call_row_loss, sharded.call_row_grad = in_turn(before[2]), in_turn(before[3])
    try:
        yield run
    finally:
        sharded.gather, VocabShard.ranks, sharded.call_row_loss, sharded.call_row_grad = before


def value_and_grad(
    case: Case, x: Tensor, y: Tensor, options: dict[str, Any], upstream: Tensor
) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    loss = case.loss()(x, y, **options)
    (grad,) = torch.autograd.grad(loss, x, upstream)
    return loss.detach(), grad


def in_parts(
    case: Case, x: Tensor, y: Tensor, options: dict[str, Any], upstream: Tensor, cuts: list[int]
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


def check(case: Case, N: int, V: int, cuts: list[int], g: torch.Generator) -> None:
    x, y, options = case.inputs(N, V, torch.float32, g)
    per_row = case.function == "selective_log_softmax"
    options |= {} if per_row else {"reduction": "sum" if "normalizer" in options else "none"}
    upstream = torch.ones(()) if "normalizer" in options else case.upstream(N, g)
    want = value_and_grad(case, x, y, options, upstream)
    got = in_parts(case, x, y, options, upstream, cuts)
    for name, a, b in zip(("loss", "gradient"), got, want, strict=True):
        scale = float(b.nan_to_num(posinf=0, neginf=0).abs().max().clamp(min=1))
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * scale, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@st.composite
def cut_anywhere(draw: st.DrawFn) -> tuple[Case, int, int, list[int], int]:
    """A case, N, V, cuts (parts may be empty), and a seed."""
    V = draw(st.sampled_from([1, 2, 7, 33, 131, 2049]))
    cuts = sorted(draw(st.lists(st.integers(0, V), min_size=0, max_size=5)))
    return draw(st.sampled_from(ALL)), draw(st.integers(1, 5)), V, [0, *cuts, V], draw(st.integers(0, 2**32))


@SETTINGS
@given(cut_anywhere())
def test_any_cut_equals_no_cut(drawn):
    case, N, V, cuts, seed = drawn
    with fastloss.use_backend("cpu"):
        check(case, N, V, cuts, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
@pytest.mark.parametrize("name", [*ISAS, "cuda:host"])
def test_every_engine(name, case, generator):
    with on_engine(name):
        check(case, 4, 131, [0, 50, 50, 131], generator)
