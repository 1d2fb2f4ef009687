"""Sizes of a GPU: real vocabularies, rows over clusters of every size, more logits than 32 bits count."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, LOSS_CASES, VOCABULARIES
from check import assert_as_good_as_torch, assert_case, judge
from engines import OnDevice
from gpu_device import DEVICE, FAKE
from on_gpu import must_run, size, there
from torch import Tensor

import fastloss
from fastloss.backends import cuda
from fastloss.spec import Rows, make_spec

if DEVICE is None:
    pytest.skip("torch sees no GPU", allow_module_level=True)
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread")]
BY_NAME = {case.name: case for case in (*CASES, *LOSS_CASES)}
CLASSES = {**VOCABULARIES, "many": 900_000}
# Every kernel family, each reduced and not; dtypes take turns.
FAMILIES = ["ignored", "everything", "probabilities", "forward_kl", "js", "topk_many", "topk_tail", "log_probs"]


@pytest.mark.parametrize("name", CLASSES)
def test_vocabularies(gpu_backend: str, name: str, generator: torch.Generator) -> None:
    V, first = size(CLASSES[name], CLASSES[name] // 64), list(CLASSES).index(name)
    # Triton compiles each anew, and the tests of every engine have most.
    families = FAMILIES if gpu_backend == "cuda" else FAMILIES[first % 3 :: 3]
    with OnDevice():
        for turn, family in enumerate(families, first):
            dtype = (torch.bfloat16, torch.float32)[turn % 2]
            reduction = ("mean", "none")[turn // 2 % 2] if family != "everything" else "sum"
            assert_case(BY_NAME[family], 3, V, dtype, reduction, generator)


def slices_of(V: int, dtype: torch.dtype) -> int:
    """How many blocks share a row of the cuda backend; 0 where it is not on chip."""
    x = torch.empty(1, V, dtype=dtype, device=DEVICE)
    rows = Rows(x, torch.zeros(1, dtype=torch.int64, device=DEVICE), None, make_spec())
    return cuda._chip_slices(cuda.module(), DEVICE, *cuda._cut(rows))


def test_clusters_of_every_size(generator: torch.Generator) -> None:
    """Rows at every alignment, in one block, in clusters of 2, 4 and 8, and too long for any."""
    must_run("cuda")
    seen = set()
    with fastloss.use_backend("cuda"), OnDevice():
        for turn, V in enumerate([4096, 32001, 50257, 128255, 262147, 900_001]):
            V = size(V, V // 64)
            for dtype in torch.bfloat16, torch.float32:
                seen.add(slices_of(V, dtype))
                for case in CASES[turn % 2 * 4], CASES[-1]:
                    x, y, options = case.inputs(3, V, dtype, generator)
                    assert_as_good_as_torch(case.loss(), case.oracle, x, y, options)
    clusters = not FAKE and torch.cuda.get_device_capability(DEVICE) >= (9, 0)
    assert not clusters or seen >= {0, 1, 2, 4, 8}, seen


# ---- more than 2^31 logits -------------------------------------------------------------------------------------------

N, V = size(16_900, 37), size(128_257, 301)  # rows of odd length: offsets are not aligned either


@contextmanager
def memory_for(logits: int) -> Iterator[None]:
    """So many tensors of logits, for one test at a time, whose workers share the GPU."""
    with open(Path(tempfile.gettempdir()) / "fastloss_gpu_memory.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not FAKE:
            assert N * V > 2**31
            torch.cuda.empty_cache()
            free, needed = torch.cuda.mem_get_info(DEVICE)[0], int((logits + 1.5) * 2 * N * V)
            if free < needed:
                pytest.skip(f"{free >> 30} GiB of {needed >> 30} are free")
        yield
        if not FAKE:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def logits() -> Tensor:
    x = torch.empty(N, V, dtype=torch.bfloat16, device=DEVICE)
    for some in x.split(1000):
        some.copy_(3 * torch.randn(some.shape, device=DEVICE))
    return x


def of_interest() -> Tensor:
    """The first and last rows, and those around the logit of number 2^31."""
    middle = min(2**31 // V, N // 2)
    return torch.tensor([0, 1, middle - 1, middle, middle + 1, N - 2, N - 1])


@pytest.mark.parametrize("name", ["ignored", "topk_tail", "reverse_kl"])
def test_more_logits_than_32_bits_count(gpu_backend: str, name: str, generator: torch.Generator) -> None:
    case = BY_NAME[name]
    with memory_for(logits=3 if case.objective.paired else 2):
        torch.manual_seed(3)
        x = logits().requires_grad_()
        few = 300  # classes, spread over all: inputs of all would take as much memory of the host
        _, y, options = case.inputs(N, few, torch.bfloat16, generator)
        target = logits() if case.objective.paired else there(torch.where(y < 0, y, y * (V // few)))
        at = of_interest()
        some = {k: v[at] if isinstance(v, Tensor) else v for k, v in options.items()}
        rows, of_target = x.detach()[there(at)].cpu(), target[there(at)].cpu()
        # One after the other: each gradient takes as much as the logits.
        upstream = torch.rand(N, generator=generator)
        losses = case.loss()(x, target, **there(options), reduction="none")
        (grad,) = torch.autograd.grad(losses, x, there(upstream).to(losses.dtype))
        got = [t.detach()[there(at)].cpu() for t in (losses, grad)]
        judge(got, case.oracle, rows, of_target, {**some, "reduction": "none"}, upstream[at])
        total = losses.detach().double().sum()
        del losses, grad
        loss = case.loss()(x, target, **there(options), reduction="sum", out_dtype=torch.float32)
        torch.testing.assert_close(loss.detach().double(), total, rtol=2e-3, atol=0)  # losses were bfloat16
        (grad,) = torch.autograd.grad(loss, x)
        got[1] = grad[there(at)].cpu()
        judge(got, case.oracle, rows, of_target, {**some, "reduction": "none"}, torch.ones(len(at)))
        del x, target, loss, grad


def test_more_logits_of_hidden_states_than_32_bits_count(gpu_backend: str) -> None:
    """In one chunk, and where the backend can, without logits in memory."""
    with memory_for(logits=1):
        torch.manual_seed(3)
        made = torch.randn(N, 64, device=DEVICE), torch.randn(V, 64, device=DEVICE) / 4
        hidden, weight = (t.bfloat16().requires_grad_() for t in made)
        y, at = torch.randint(V, (N,), device=DEVICE), there(of_interest())
        for reduction in "sum", "none":
            loss = fastloss.linear_cross_entropy(
                hidden, weight, y, reduction=reduction, max_chunk_bytes=1 << 40, out_dtype=torch.float32
            )
            found, of_weight = torch.autograd.grad(loss.sum(), (hidden, weight))
            exact = [t.detach().double().requires_grad_() for t in (hidden[at], weight)]
            losses = F.cross_entropy(F.linear(*exact), y[at], reduction="none")
            (want,) = torch.autograd.grad(losses.sum(), exact[:1])
            assert (found[at] - want).norm() < 2e-2 * want.norm()
            assert of_weight.isfinite().all()
            if reduction == "none":
                torch.testing.assert_close(loss[at].double(), losses.detach(), rtol=2e-2, atol=2e-2)
        del hidden, weight, loss, found, of_weight
