"""torch.utils.flop_counter.FlopCounterMode: what it counts of losses from hidden states."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fastloss
from fastloss import backends
from fastloss.linear import heads

N, H, G, V = 12, 8, 10, 128
ONE, TEACHERS = 2 * N * H * V, 2 * N * G * V
BLOCKS = {"max_chunk_bytes": V * H * 4}  # the sums of a 16-bit weight's gradient may take half of that: two blocks
CLASSES, INDICES, PROBS = torch.arange(N), torch.zeros(N, 3, dtype=torch.int64), torch.full((N, 3), 0.2)


def teacher(h: Tensor) -> dict[str, Tensor]:
    return {"target_input": torch.ones(N, G).to(h.dtype), "target_linear_weight": torch.ones(V, G).to(h.dtype)}


def on_one(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Of a shard that is all of the vocabulary."""
    return lambda h, w, **more: loss(h, w, shard=fastloss.VocabShard(0, V, V), **more)


L, S = fastloss.linear_cross_entropy, fastloss.linear_selective_log_softmax
KL = lambda h, w, **more: fastloss.linear_kl_div(h, w, **teacher(h), **more)  # noqa: E731
JS = lambda h, w, **more: fastloss.linear_js_div(h, w, **teacher(h), **more)  # noqa: E731
# name -> loss, and how often forward and backward multiply: its own logits and gradients, its teacher's logits.
LOSSES: dict[str, tuple[Callable[..., Any], int, int]] = {
    "mean": (lambda h, w, **more: L(h, w, CLASSES, **more), 3, 0),
    "sum": (lambda h, w, **more: L(h, w, CLASSES, reduction="sum", **more), 3, 0),
    "filtered": (lambda h, w, **more: L(h, w, CLASSES, filter_eps=0.0, **more), 3, 0),
    "none": (lambda h, w, **more: L(h, w, CLASSES, reduction="none", **more), 4, 0),
    "statistics": (lambda h, w, **more: L(h, w, CLASSES, return_stats=True, **more)[1].lse, 4, 0),
    "probabilities": (lambda h, w, **more: L(h, w, torch.full((N, V), 1 / V), **more), 3, 0),
    "top-k": (lambda h, w, **more: fastloss.linear_topk_cross_entropy(h, w, INDICES, PROBS, **more), 3, 0),
    "top-k tail": (
        lambda h, w, **more: fastloss.linear_topk_kl_div(h, w, INDICES, PROBS, tail="lump", **more),
        3,
        0,
    ),
    "selected": (lambda h, w, **more: S(h, w, INDICES, **more), 4, 0),
    "KL": (KL, 3, 1),
    "KL none": (lambda h, w, **more: KL(h, w, reduction="none", **more), 4, 2),
    "JS": (JS, 3, 1),
    "shard": (on_one(lambda h, w, **more: L(h, w, CLASSES, **more)), 4, 0),
    "JS shard": (on_one(JS), 5, 3),
}
losses = pytest.mark.parametrize("name", LOSSES)


def tensors(dtype: torch.dtype = torch.float32, needs: tuple[bool, bool] = (True, True)) -> list[Tensor]:
    made = torch.randn(N, H).to(dtype), torch.randn(V, H).to(dtype)
    return [t.requires_grad_(n) for t, n in zip(made, needs, strict=True)]


def step(loss: Callable[..., Tensor], *leaves: Tensor, **more: Any) -> None:
    value = loss(*leaves, **more)
    if value.requires_grad:
        value.sum().backward()


def counted(*args: Any, **more: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        step(*args, **more)
    return counter.get_total_flops()


def test_as_many_as_torch() -> None:
    """Of the loss that both have, whichever gradients are wanted."""
    for needs in product((True, False), repeat=2):
        theirs = counted(lambda h, w: F.cross_entropy(F.linear(h, w), CLASSES), *tensors(needs=needs))
        assert counted(LOSSES["mean"][0], *tensors(needs=needs)) == theirs == ONE * (1 + sum(needs))


@losses
def test_losses(name: str) -> None:
    loss, own, teachers = LOSSES[name]
    assert counted(loss, *tensors()) == own * ONE + teachers * TEACHERS
    rounds = 2 if name == "JS shard" else 1
    assert counted(loss, *tensors(needs=(False, False))) == rounds * (ONE + (TEACHERS if teachers else 0))


@losses
def test_16_bit_heads_by_blocks(name: str) -> None:
    """Their logits, and a teacher's, are made once more."""
    loss, own, teachers = LOSSES[name]
    want = (own + 1) * ONE + (teachers + bool(teachers)) * TEACHERS
    assert counted(loss, *tensors(torch.bfloat16), **BLOCKS) == want


@losses
def test_what_is_really_multiplied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever gradients are wanted, of heads in one piece and by blocks."""
    multiplied, choose = 0, backends.choose_for

    def counting(*request: Any) -> backends.Backend:
        backend = choose(*request)

        def matmul(a: Tensor, b: Tensor, *args: Any) -> None:
            nonlocal multiplied
            multiplied += 2 * a.shape[0] * a.shape[1] * b.shape[1]
            backend.matmul(a, b, *args)

        return backend._replace(matmul=matmul)

    monkeypatch.setattr(heads, "choose_for", counting)
    for dtype, more in (torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, BLOCKS):
        for needs in product((True, False), repeat=2):
            multiplied = 0
            said = counted(LOSSES[name][0], *tensors(dtype, needs), **more)
            assert said == multiplied > 0, (dtype, needs)


def test_every_operator_over_a_head_has_a_formula() -> None:
    found = {
        schema.name.partition("::")[2]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("fastloss::") and any(a.name == "head_weight" for a in schema.arguments)
    }
    assert found >= {"linear_loss", "linear_row_grad", "sharded_head_grad"}
    assert not [name for name in found if getattr(torch.ops.fastloss, name) not in flop_registry]


@pytest.mark.parametrize("first", ["fastloss", "torch.utils.flop_counter"])
def test_the_counter_is_not_imported_for_it(first: str) -> None:
    """Whichever comes first, a counter knows the formulas; ours alone leaves torch's module out."""
    second = {"fastloss": "torch.utils.flop_counter"}.get(first, "fastloss")
    code = f"""
import sys, torch, {first}
assert ("torch.utils.flop_counter" in sys.modules) == ({first!r} != "fastloss")
import {second}
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    sys.modules["fastloss"].linear_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 1]))
assert counter.get_total_flops() == 2 * 2 * 3 * 5
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
