"""A vocabulary that GPUs share, over NCCL: losses and gradients beside float64 of all classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import linear_calls
import pytest
import torch
from cases import CASES, LOSS_CASES, Case
from check import judge
from gpu_device import DEVICE, FAKE, counting, launches
from on_gpu import here, must_run, there
from ranks import Ranks, ranks
from torch import Tensor

import fastloss
from fastloss import VocabShard

if DEVICE is None:
    pytest.skip("torch sees no GPU", allow_module_level=True)
if FAKE or torch.cuda.device_count() < 2:
    pytest.skip("there is one GPU", allow_module_level=True)
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread")]
BY_NAME = {case.name: case for case in (*CASES, *LOSS_CASES)}
N, V = 12, 5003  # of which no number of ranks takes equal parts
DENSE = ["ignored", "everything", "probabilities_weight_smoothing", "reverse_kl", "js", "topk_tail", "log_probs"]
LINEAR = ["ignored", "everything", "js", "topk_tail"]
BACKENDS = ["cuda", "triton"]


@pytest.fixture(scope="module")
def gpus() -> Iterator[Ranks]:
    """Up to four; more than the node has to spare help nobody."""
    with ranks(min(4, torch.cuda.device_count()), backend="nccl") as started:
        yield started


def inputs(name: str, dtype: torch.dtype, reduction: str) -> tuple[Case, Tensor, Tensor, dict[str, Any], Any]:
    """Of all classes: logits, target, options, upstream gradient."""
    case, g = BY_NAME[name], torch.Generator().manual_seed(3)
    x, y, options = case.inputs(N, V, dtype, g)
    per_row = case.function == "selective_log_softmax"
    options |= {} if per_row else {"reduction": reduction}
    return case, x, y, options, case.upstream(N, g) if per_row or reduction == "none" else None


def of_logits(backend: str, name: str, dtype: torch.dtype, reduction: str) -> tuple[list[Tensor], int]:
    """Loss and gradient of this rank's classes, and launches."""
    case, x, y, options, upstream = inputs(name, dtype, reduction)
    shard = VocabShard.even(V)
    own = slice(shard.start, shard.stop)
    if y.is_floating_point():
        y = y[:, own]
    if options.get("weight") is not None:
        options["weight"] = options["weight"][own]
    leaf = there(x[:, own]).requires_grad_()
    with fastloss.use_backend(backend), counting() as seen:
        loss = case.loss()(leaf, there(y), **there(options), shard=shard)
        g = torch.ones_like(loss) if upstream is None else there(upstream).to(loss.dtype)
        (grad,) = torch.autograd.grad(loss, leaf, g)
        assert loss.device == grad.device == torch.device("cuda", torch.distributed.get_rank())
        return here([loss.detach(), grad]), seen.number


def call_of(name: str, dtype: torch.dtype) -> linear_calls.Call:
    return linear_calls.Call(BY_NAME[name], N, V, dtype, torch.Generator().manual_seed(3))


def of_hidden_states(backend: str, name: str, dtype: torch.dtype, reduction: str) -> tuple[list[Tensor], int]:
    """Loss and gradients of this rank's classes, that of hidden states of all, and launches."""
    shard = VocabShard.even(V)
    call = there(call_of(name, dtype).of_classes(slice(shard.start, shard.stop)))
    with fastloss.use_backend(backend), counting() as seen:
        got = linear_calls.results(call.ours, call.head, None, reduction=reduction, shard=shard)
        return here(got), seen.number


def launched(found: list[tuple[list[Tensor], int]]) -> list[list[Tensor]]:
    """What ranks computed, whose launches count here."""
    assert all(number for _, number in found)
    launches.number += sum(number for _, number in found)
    return [got for got, _ in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits(gpus: Ranks, backend: str, name: str, dtype: torch.dtype) -> None:
    must_run(backend)
    for reduction in ("sum",) if name == "everything" else ("mean", "none"):
        each = launched(gpus.run(of_logits, backend, name, dtype, reduction))
        assert all(torch.equal(loss, each[0][0]) for loss, _ in each)
        case, x, y, options, upstream = inputs(name, dtype, reduction)
        judge([each[0][0], torch.cat([grad for _, grad in each], 1)], case.oracle, x, y, options, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_states(gpus: Ranks, backend: str, name: str, dtype: torch.dtype) -> None:
    must_run(backend)
    for reduction in ("sum",) if name == "everything" else ("mean", "none"):
        each = launched(gpus.run(of_hidden_states, backend, name, dtype, reduction))
        for loss, hidden, *_ in each:
            assert torch.equal(loss, each[0][0]) and torch.equal(hidden, each[0][1])
        whole = [*each[0][:2], *(torch.cat(grads) for grads in list(zip(*each, strict=True))[2:])]
        linear_calls.assert_as_good_as_torch(call_of(name, dtype), None, whole, reduction=reduction)
