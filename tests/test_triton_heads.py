"""Logits that Triton never writes: executed as PTX and in the interpreter, and compiled for what it is meant for."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from triton_engine import TARGETS, assert_multiplies_well, emulated, in_shapes, launches, taking_turns

import fastloss
from fastloss.backends import triton as backend
from fastloss.linear.heads import Head, stand_in
from fastloss.spec import Rows, make_spec

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install triton"),
    pytest.mark.usefixtures("one_thread"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"linear_bias": True},
    "smoothing": {"label_smoothing": 0.1, "weight": True},
    "softcap": {"softcap": 3.0, "logit_scale": 1.3, "z_loss": 1e-2, "linear_bias": True},
}


@pytest.fixture
def log() -> Iterator[list[Any]]:
    with emulated(race_mode="collect") as launched:
        yield launched
    # Where several warps hold the same number, Triton has them all write it.
    others = [
        race for launch in launched for race in launch.races if "write the same byte in one instruction" not in race
    ]
    assert not others


def head(N: int, V: int, H: int, dtype: torch.dtype, g: torch.Generator) -> tuple[list[torch.Tensor], torch.Tensor]:
    made = [(torch.randn(s, generator=g) * k).to(dtype) for s, k in (((N, H), 1), ((V, H), 2 / H**0.5), ((V,), 0.5))]
    y = torch.randint(V, (N,), generator=g)
    y[N // 2] = -100
    return made, y


def check(N: int, V: int, H: int, dtype: torch.dtype, g: torch.Generator, **options: Any) -> None:
    """Losses and statistics against float64 logits."""
    (hidden, weight, bias), y = head(N, V, H, dtype, g)
    options = {**options, "weight": torch.rand(V, generator=g).to(dtype) if options.get("weight") else None}
    bias = bias if options.pop("linear_bias", False) else None
    with torch.no_grad():
        loss, stats = fastloss.linear_cross_entropy(
            hidden, weight, y, linear_bias=bias, return_stats=True, out_dtype=torch.float32, **options
        )
        plain = fastloss.linear_cross_entropy(hidden, weight, y, linear_bias=bias, out_dtype=torch.float32, **options)
    exact = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    with fastloss.use_backend("reference"):
        if options["weight"] is not None:
            options["weight"] = options["weight"].double()
        want, expected = fastloss.cross_entropy(exact, y, return_stats=True, **options)
    close = {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close((loss, plain), (want.float(),) * 2, **close)
    torch.testing.assert_close(tuple(stats[:3]), tuple(t.float() for t in expected[:3]), **close)
    assert torch.equal(stats.argmax, expected.argmax) and torch.equal(stats.correct, expected.correct)


@pytest.mark.parametrize("options", OPTIONS)
def test_executed(log, options, generator):
    """Rows, classes and depths that fill no tile; a vocabulary of more than one slice. Dtypes take turns."""
    dtype = (torch.bfloat16, torch.float16)[list(OPTIONS).index(options) % 2]
    check(5, 2100, 40, dtype, generator, **OPTIONS[options])
    assert {launch.kernel.split("(")[0] for launch in log} & {"head_states"}


@pytest.mark.parametrize("turn", [1, 2])
def test_in_another_shape(log, turn, generator):
    with in_shapes(taking_turns(turn)):
        check(66, 130, 40, torch.bfloat16, generator, **OPTIONS["bias" if turn == 1 else "softcap"])


def test_unaligned_and_deep(log, generator):
    check(3, 130, 77, torch.bfloat16, generator)  # of no 16-byte access
    check(2, 33, 150, torch.bfloat16, generator)


def test_a_masked_class_and_ignored_rows(log, generator):
    (hidden, weight, bias), y = head(4, 150, 32, torch.bfloat16, generator)
    bias[7] = -torch.inf
    y[:] = torch.tensor([3, -100, 7, 149])
    with torch.no_grad():
        loss = fastloss.linear_cross_entropy(hidden, weight, y, linear_bias=bias, reduction="none")
    want = F.cross_entropy(F.linear(hidden.double(), weight.double(), bias.double()), y, reduction="none")
    torch.testing.assert_close(loss.double(), want, rtol=1e-2, atol=1e-2)
    assert loss[1] == 0 and loss[2] == torch.inf


def test_ignored_rows_are_in_no_product(log, generator):
    """Wherever they are: as many operations of tensor cores as for the rows that count, in whole tiles, and no hidden
    state of theirs is read."""
    (hidden, weight, _), y = head(264, 130, 32, torch.bfloat16, generator)
    scattered = torch.randperm(264, generator=generator)[:137]
    y[scattered], y[:3] = -100, 5
    token_weight = torch.ones(264)
    token_weight[:2] = 0
    counts = (y != -100) & (token_weight != 0)
    hidden[~counts] = torch.nan
    with torch.no_grad():
        loss = fastloss.linear_cross_entropy(hidden, weight, y, token_weight=token_weight, reduction="sum")
        want = F.cross_entropy(F.linear(hidden[counts].double(), weight.double()), y[counts], reduction="sum")
    torch.testing.assert_close(loss.double(), want, rtol=1e-2, atol=0)
    of_some = multiplied(log)
    log.clear()
    with torch.no_grad():
        fastloss.linear_cross_entropy(hidden[counts], weight, y[counts], reduction="sum")
    assert 64 < counts.sum() <= 128 and 0 < of_some == multiplied(log)


def multiplied(log: list[Any]) -> int:
    """Operations of tensor cores."""
    return sum(launch.by_base.get("mma", 0) for launch in log)


def test_nothing_of_the_vocabulary_is_written(log, generator):
    (hidden, weight, _), y = head(4, 4096, 64, torch.bfloat16, generator)
    with torch.no_grad():
        fastloss.linear_cross_entropy(hidden, weight, y)
    written = sum(launch.store_bytes for launch in log)
    assert written < 4 * 1024, "states of two slices and statistics, not 4 x 4096 logits"


def launches_of(target: str, dtype: torch.dtype, extras: bool, **options: Any) -> list[Any]:
    """head_states, in shapes of a large model's layer."""
    V, H = 32000, 1024
    made = Head(torch.randn(130, H).to(dtype), torch.randn(V, H).to(dtype), torch.randn(V).to(dtype))
    rows = Rows(stand_in(made), torch.zeros(130, dtype=torch.int64), None, make_spec(**options))
    index = torch.zeros(130, dtype=torch.int64)
    out = torch.empty(130), torch.empty(5, 130), index if extras else None, index
    found = launches(lambda kernels: kernels.head_stats(rows, *made, *out), target)
    return [launch for launch in found if launch.kernel.__name__ == "head_states"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["plain", "statistics", "general"])
def test_machine_code(target, kind):
    """In every shape."""
    options = {"softcap": 5.0, "label_smoothing": 0.1} if kind == "general" else {}
    dtype = torch.bfloat16 if kind == "plain" else torch.float16
    for launch in launches_of(target, dtype, kind != "plain", **options):
        assert_multiplies_well(launch, target)


def test_other_dtypes_are_the_librarys(generator):
    kernels = backend.kernels()
    for dtype, takes in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False), (torch.float64, False)):
        made = Head(torch.randn(2, 8).to(dtype), torch.randn(9, 8).to(dtype), None)
        rows = Rows(stand_in(made), torch.zeros(2, dtype=torch.int64), None, make_spec())
        assert kernels.takes_head(rows, made.hidden, made.weight) is takes
