"""Tensors as they come on a GPU: every dtype at odd addresses, odd strides of rows and upstream gradients, few rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, DTYPES, LOSS_CASES, Case
from check import assert_as_good_as_torch, judge, value_and_grad
from engines import OnDevice
from gpu_device import DEVICE
from on_gpu import here, size, there
from torch import Tensor

import fastloss

if DEVICE is None:
    pytest.skip("torch sees no GPU", allow_module_level=True)
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread")]
BY_NAME = {case.name: case for case in (*CASES, *LOSS_CASES)}
# One or two of each kind of kernel; half for each dtype.
FAMILIES = ["ignored", "everything", "reverse_kl", "js", "topk", "topk_tail", "log_probs", "probabilities"]

# Rows (N, V) elsewhere in memory: at an offset that no 16-byte access takes, and an odd number of elements apart.
PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "offset_1": lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape),
    "offset_3": lambda x: F.pad(x.flatten(), (3, 0))[3:].view(x.shape),
    "odd_stride": lambda x: F.pad(x, (0, 3 - x.shape[1] % 2))[:, : x.shape[1]],
    "both": lambda x: F.pad(x, (3, 2 + x.shape[1] % 2))[:, 3 : 3 + x.shape[1]],
}
# Upstream gradients (N, ...) of other strides.
UPSTREAM: dict[str, Callable[[Tensor], Tensor]] = {
    "every_other": lambda g: torch.stack([g, g + 5], -1)[..., 0],
    "one_for_all": lambda g: g.flatten()[0].expand(g.shape),
}


def placed(case: Case, place: str) -> Callable[..., Tensor]:
    """The case's loss, with logits and dense targets at a place."""

    def loss(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        return case.loss()(PLACES[place](x), PLACES[place](y) if y.is_floating_point() else y, **options)

    return loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_places(gpu_backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Every kernel family at every place; families, shapes, reductions and strides of upstream gradients take turns."""
    turn = DTYPES.index(dtype)
    with OnDevice():
        for family in FAMILIES[turn % 2 :: 2]:
            case = BY_NAME[family]
            for place in PLACES:
                turn += 1
                V = (1024, 1003)[turn // 2 % 2]
                x, y, options = case.inputs(5, V, dtype, generator)
                upstream = None
                if family == "log_probs" or (turn % 2 and "normalizer" not in options):
                    options |= {} if family == "log_probs" else {"reduction": "none"}
                    upstream = list(UPSTREAM.values())[turn // 4 % 2](case.upstream(5, generator))
                assert_as_good_as_torch(placed(case, place), case.oracle, x, y, options, upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_that_count(gpu_backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """None, and nothing but ignored ones."""
    with OnDevice():
        x, y = torch.randn(4, 33, generator=generator).to(dtype), torch.full((4,), -100)
        for reduction in "mean", "sum", "none":
            got = value_and_grad(fastloss.cross_entropy, x, None, y, reduction=reduction)
            want = value_and_grad(F.cross_entropy, x, None, y, reduction=reduction)
            torch.testing.assert_close(got, want, equal_nan=True)
            assert not got[1].any()
            empty = value_and_grad(fastloss.cross_entropy, x[:0], None, y[:0], reduction=reduction)
            assert empty[1].shape == (0, 33) and (reduction == "mean" or not empty[0].any())


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_extreme_logits(gpu_backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Masked classes and logits of 1e4, in rows on chip and in slices."""
    with OnDevice():
        for V in 1003, size(140_001, 9001):
            for name in "ignored", "smoothing", "topk":
                case = BY_NAME[name]
                x, y, options = case.inputs(3, V, dtype, generator)
                for shift in 1e4, -1e4:
                    assert_as_good_as_torch(case.loss(), case.oracle, x + shift, y, options)
                if name == "smoothing":
                    continue  # infinite where a class is masked
                masked = torch.rand(3, V, generator=generator) < 0.5
                x = x.masked_fill(masked & ~listed(y, V), -torch.inf)
                x[0, V // 2 :] = torch.where(listed(y, V)[0, V // 2 :], x[0, V // 2 :], -torch.inf)
                grad = value_and_grad(case.loss(), x, None, y, **options)[1]
                assert grad.isfinite().all() and not grad[x == -torch.inf].any()
                assert_as_good_as_torch(case.loss(), case.oracle, x, y, options)


def listed(y: Tensor, V: int) -> Tensor:
    """The classes of a row's target, (N, V)."""
    return F.one_hot(y.clamp(0).view(len(y), -1), V).sum(1) > 0


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_in_place(gpu_backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """The gradient takes the logits' memory, at every place and for every loss that has the option."""
    upstream = torch.tensor(0.25)
    for name in "ignored", "probabilities", "forward_kl", "js", "topk":
        case = BY_NAME[name]
        for V in 1003, size(140_000, 9000):
            x, y, options = case.inputs(3, V, dtype, generator)
            logits = there(x).requires_grad_() * 1
            memory = logits.data_ptr()
            loss = case.loss()(logits, there(y), **there(options), inplace=True)
            (grad,) = torch.autograd.grad(loss, logits, there(upstream).to(loss.dtype))
            assert grad.data_ptr() == memory
            judge(here([loss.detach(), grad]), case.oracle, x, y, options, upstream)
