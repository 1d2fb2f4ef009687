"""A first call that goes into a CUDA graph, with no warm-up: what replays compute of other numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import linear_calls
import pytest
import torch
from cases import CASES, LOSS_CASES, Case
from check import judge, value_and_grad
from gpu_device import DEVICE, captured, synchronize
from on_gpu import here, in_own_process, size, there
from torch import Tensor

if DEVICE is None:
    pytest.skip("torch sees no GPU", allow_module_level=True)
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread")]
BY_NAME = {case.name: case for case in (*CASES, *LOSS_CASES)}


class Kind(NamedTuple):
    """A loss that is captured: of logits, or `linear`, of hidden states."""

    case: str
    reduction: str
    linear: bool = False
    dtype: torch.dtype = torch.bfloat16
    filter_eps: float | None = None


KINDS = {
    "mean": Kind("ignored", "mean"),
    "none": Kind("ignored", "none"),
    "float32": Kind("everything", "sum", dtype=torch.float32),
    "smoothing_weight": Kind("smoothing_weight", "mean"),
    "probabilities": Kind("probabilities", "none"),
    "kl": Kind("forward_kl", "mean"),
    "js": Kind("js", "mean"),
    "topk": Kind("topk_ignored", "mean"),
    "topk_tail": Kind("topk_tail", "none"),
    "log_probs": Kind("log_probs", "none"),
    "linear mean": Kind("ignored", "mean", True),
    "linear none": Kind("ignored", "none", True),
    "linear filtered": Kind("ignored", "mean", True, filter_eps=0.0),
    "linear js": Kind("js", "mean", True, torch.float32),
}


class Given(NamedTuple):
    """CPU tensors of one call."""

    x: Tensor | None
    call: Any  # the target, or a linear_calls.Call
    options: dict[str, Any]
    upstream: Tensor | None


def given_of(kind: Kind, seed: int) -> Given:
    case, g = BY_NAME[kind.case], torch.Generator().manual_seed(seed)
    N, V = 24, size(32000 if not kind.linear else 2200, 301)
    per_row = case.function == "selective_log_softmax"
    options = {} if per_row else {"reduction": kind.reduction}
    upstream = case.upstream(N, g) if kind.reduction == "none" else None
    if kind.linear:
        options |= {} if kind.filter_eps is None else {"filter_eps": kind.filter_eps}
        return Given(None, linear_calls.Call(case, N, V, kind.dtype, g), options, upstream)
    x, y, more = case.inputs(N, V, kind.dtype, g)
    return Given(x, y, {**more, **options}, upstream)


def computed(case: Case, on: Given) -> list[Tensor]:
    """Loss and gradients."""
    if on.x is None:
        return linear_calls.results(on.call.ours, on.call.head, on.upstream, **on.options)
    return list(value_and_grad(case.loss(), on.x, on.upstream, on.call, **on.options))


def judged(case: Case, given: Given, got: list[Tensor]) -> None:
    if given.x is not None:
        judge(got, case.oracle, given.x, given.call, given.options, given.upstream)
        return
    options = {name: value for name, value in given.options.items() if name != "filter_eps"}
    linear_calls.assert_as_good_as_torch(given.call, given.upstream, got, **options)


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, linear_calls.Call):
        value = [value.target, value.options, value.head]
    return [t for v in value for t in tensors_of(v)] if isinstance(value, (tuple, list)) else []


def ready_matmuls(dtype: torch.dtype) -> None:
    """torch's matmuls: cuBLAS cannot be started while a graph is captured, by a thread of forwards or of backwards."""
    x = torch.ones(16, 16, dtype=dtype, device=DEVICE, requires_grad=True)
    (x @ x).sum().backward()


def replays(name: str, between: bool) -> list[list[Tensor]]:
    """What replays compute of the captured numbers and of others; `between`, of an eager call before the first."""
    kind = KINDS[name]
    case = BY_NAME[kind.case]
    given = [there(given_of(kind, seed)) for seed in (1, 2)]
    static = there(given_of(kind, 1))
    out: list[list[Tensor]] = [[]]
    if kind.linear:
        ready_matmuls(kind.dtype)

    def work() -> None:
        out[0] = computed(case, static)

    synchronize()
    replay = captured(work)
    found = [here(computed(case, given[0]))] if between else []
    for numbers in given:
        for to, new in zip(tensors_of(static), tensors_of(numbers), strict=True):
            to.copy_(new)
        replay()
        synchronize()
        found.append(here(out[0]))
    return found


@pytest.mark.parametrize("name", KINDS)
def test_first_call_is_captured(gpu_backend: str, name: str) -> None:
    """In a process of its own: no kernel is loaded yet, and no shape was timed."""
    kind = KINDS[name]
    for seed, got in zip((1, 2), in_own_process(gpu_backend, replays, name, False), strict=True):
        judged(BY_NAME[kind.case], given_of(kind, seed), got)


def test_eager_call_before_the_first_replay(gpu_backend: str) -> None:
    """What the captured call keeps for later ones lies in no memory that only a replay fills."""
    kind = KINDS["linear mean"]
    for seed, got in zip((1, 1, 2), in_own_process(gpu_backend, replays, "linear mean", True), strict=True):
        judged(BY_NAME[kind.case], given_of(kind, seed), got)
