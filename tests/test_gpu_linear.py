"""LM heads on a GPU: Triton's kernels that write no logits, gradients whose small tiles are left out, shapes that are
timed; each beside float64. (The tests of every engine have all losses of hidden states, in chunks.)"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import linear_calls
import pytest
import test_triton_head_grads
import test_triton_heads
import torch
import torch.nn.functional as F
from cases import CASES
from engines import OnDevice
from gpu_device import BACKENDS, DEVICE, FAKE
from on_gpu import here, in_own_process, size, there
from torch import Tensor

import fastloss

if DEVICE is None:
    pytest.skip("torch sees no GPU", allow_module_level=True)
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread")]
OPTIONS = test_triton_heads.OPTIONS
# Where the fake device runs Triton's kernels at all, it does for the triton backend alone.
HEADS = () if find_spec("triton") is None else tuple(BACKENDS if not FAKE else BACKENDS[1:])


@pytest.mark.parametrize("options", OPTIONS)
def test_kernels(gpu_backend: str, options: str, generator: torch.Generator) -> None:
    """Scoring, and gradients by statistics; of tiles that rows, classes and depths fill and do not fill. Dtypes take
    turns."""
    dtype = (torch.bfloat16, torch.float16)[list(OPTIONS).index(options) % 2]
    shapes = [(70, 2100, 40), (256, 4096, 64)]
    for N, V, H in shapes if options in ("bias", "softcap") else shapes[:1]:
        with OnDevice():
            if gpu_backend in HEADS:
                test_triton_heads.check(N, V, H, dtype, generator, **OPTIONS[options])
            for reduction, filter_eps in ("none", None), ("mean", 0.0), ("sum", 1e-7):
                given = {**OPTIONS[options], "filter_eps": filter_eps}
                test_triton_head_grads.check(N, V, H, dtype, generator, reduction, **given)


@pytest.mark.parametrize("more", [{}, {"max_chunk_bytes": 1 << 30}, {"filter_eps": 0.0}], ids=str)
def test_a_real_head(gpu_backend: str, more: dict[str, Any], generator: torch.Generator) -> None:
    """In many chunks and with the weight's gradient by blocks of classes; in one; without logits."""
    N, V, H = size(1000, 40), size(32001, 301), size(1024, 40)
    with OnDevice():
        for reduction in "mean", "none":
            test_triton_head_grads.check(N, V, H, torch.bfloat16, generator, reduction, **more)


def test_what_filter_eps_leaves_out(gpu_backend: str, generator: torch.Generator) -> None:
    """Hidden states' and weight's gradients are off by less than the bounds in docs/math.md; and something is left out,
    as `explain` says, wherever Triton runs."""
    N, V, H, eps = 200, 1000, 64, 2.0**-6
    rows, given, _ = test_triton_head_grads.peaked(N, V, H, torch.bfloat16, generator)
    y, (hidden, weight, bias) = rows.target, given
    filters = gpu_backend in HEADS
    says = "leaves out small tiles" if filters else "no effect: the gradient is exact"
    assert f"filter_eps {says}" in fastloss.explain(there(hidden), there(y), linear_weight=there(weight))
    found = {}
    for filter_eps in eps, None:
        leaves = [there(t).requires_grad_() for t in (hidden, weight)]
        loss = fastloss.linear_cross_entropy(
            *leaves, there(y), linear_bias=there(bias), reduction="sum", filter_eps=filter_eps
        )
        found[filter_eps] = here(torch.autograd.grad(loss, leaves))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    F.cross_entropy(F.linear(*exact, bias.double()), y, reduction="sum").backward()
    counts = (y != -100).double()
    bounds = eps * counts[:, None] * weight.double().abs().sum(0), eps * (counts[:, None] * hidden.abs()).sum(0)
    for filtered, whole, want, bound in zip(found[eps], found[None], exact, bounds, strict=True):
        rounding = 2e-2 * want.grad.abs().max()
        assert ((filtered - want.grad).abs() <= bound + rounding).all()
        assert ((whole - want.grad).abs() <= rounding).all()
    left_out = slice(128, 256)  # classes that are a tile of next to nothing
    assert found[None][1][left_out].any() and found[eps][1][left_out].any() != filters


def under_both() -> list[list[list[Tensor]]]:
    """Results with deterministic algorithms, when shapes are timed, and when they have been."""
    from fastloss.backends.triton.head_kernels import head_grad, head_states, kept_product

    call, upstream = there(call_and_upstream())

    def results() -> list[list[Tensor]]:
        limit = {"max_chunk_bytes": 1 << 20}  # chunks: a product adds to what others left
        reduced = linear_calls.results(call.ours, call.head, None, filter_eps=1e-7, **limit)
        return here([reduced, linear_calls.results(call.ours, call.head, upstream, reduction="none", **limit)])

    tuned = head_states, head_grad, kept_product
    torch.use_deterministic_algorithms(True)
    found = [results()]
    assert not any(kernel.tuners for kernel in tuned)
    torch.use_deterministic_algorithms(False)
    found += [results(), results()]
    assert all(kernel.tuners for kernel in tuned)
    return found


def call_and_upstream() -> tuple[linear_calls.Call, Tensor]:
    g = torch.Generator().manual_seed(5)
    return linear_calls.Call(CASES[1], 300, 4099, torch.bfloat16, g), torch.rand(300, generator=g)


@pytest.mark.skipif(FAKE or not HEADS, reason="nothing is timed without Triton, or on the fake device")
def test_timed_shapes_and_others(gpu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deterministic algorithms time nothing; what is timed, and what was chosen, compute the same."""
    # In a process of its own: what torch asks of cuBLAS to be deterministic, it reads once.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    found = in_own_process(gpu_backend, under_both)
    call, upstream = call_and_upstream()
    for reduced, each in found:
        linear_calls.assert_as_good_as_torch(call, None, reduced)
        linear_calls.assert_as_good_as_torch(call, upstream, each, reduction="none")
    for a, b in zip(found[1], found[2], strict=True):
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
