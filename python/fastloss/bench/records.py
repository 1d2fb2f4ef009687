"""What is measured beside the times of the cases: small calls, peak memory, import time, error against float64."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss

from . import ranks
from .cases import Case, Settings, inputs
from .devices import Device
from .losses import chunked, linear, linear_then_loss
from .measure import Result
from .processes import child, run

Record = list[dict[str, Any]]
LOSSES: dict[str, Callable[..., Tensor]] = {"fastloss": fastloss.cross_entropy, "torch": F.cross_entropy}
LINEAR_LOSSES: dict[str, Callable[..., Tensor]] = {
    "fastloss": linear,
    "torch": linear_then_loss,
    "torch chunked": chunked,
}
_DTYPES = ("float32", "bfloat16")
_BLOCK = 100  # small calls between two looks at the clock


def small_calls(settings: Settings, device: Device) -> Record:
    """Microseconds of one 8x16 call; blocks of calls alternate between the two losses.

    Beside the median stands the best block: where other processes hold a core, a small call of torch can wait for its
    OpenMP team for milliseconds.
    """
    x, target, _ = inputs(Case("plain", "float32", 8, 16, True), device=device.device)

    def backward(loss: Callable[..., Tensor]) -> None:
        loss(x, target).backward()
        x.grad = None

    def forward(loss: Callable[..., Tensor]) -> None:
        loss(x, target)

    rows = []
    for work, call, grad in (("forward+backward", backward, True), ("forward", forward, False)):
        seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
        with torch.set_grad_enabled(grad):
            for _ in range(settings.small_blocks):
                for name, loss in LOSSES.items():
                    start = time.perf_counter()
                    for _ in range(_BLOCK):
                        call(loss)
                    device.wait()
                    seconds[name].append((time.perf_counter() - start) / _BLOCK)
        for kind, choose in (("median", statistics.median), ("best", min)):
            micro = {f"{name}_us": choose(times) * 1e6 for name, times in seconds.items()}
            rows.append({"work": work, "of": kind, **micro, "extra_us": micro["fastloss_us"] - micro["torch_us"]})
    return rows


def peak_memory(settings: Settings, device: Device) -> Record:
    """MiB above logits and gradient at the peak of forward+backward."""
    N, V = settings.record_shape
    rows = []
    for dtype in _DTYPES:
        gradient = N * V * getattr(torch, dtype).itemsize
        row: dict[str, Any] = {"case": f"{dtype} {N}x{V}", "gradient_mib": gradient / 2**20}
        for name, loss in LOSSES.items():
            row[f"{name}_mib"] = device.extra_bytes(name, loss, Case("plain", dtype, N, V, True)) / 2**20
        rows.append(row)
    return rows


def linear_memory(settings: Settings, device: Device) -> Record:
    """MiB above hidden states, weight and their gradients at the peak of forward+backward, as N grows."""
    N, V = settings.record_shape
    rows = []
    for n in (N // 4, N // 2, N, 2 * N):
        row: dict[str, Any] = {"N": n, "H": 256, "V": V, "logits_mib": n * V * 4 / 2**20}
        for name, loss in LINEAR_LOSSES.items():
            if name == "torch chunked" and not hasattr(F, "linear_cross_entropy"):
                continue
            case = Case("linear", "float32", n, V, True, H=256)
            row[f"{name}_mib"] = device.extra_bytes(name, loss, case) / 2**20
        rows.append(row)
    return rows


def shared_vocabulary(settings: Settings, device: Device) -> Record:
    """Milliseconds of a loss whose classes two ranks share, whatever the device: processes, on the CPU."""
    return ranks.shared_vocabulary(min(settings.rounds, 9))


def import_time(settings: Settings, device: Device) -> Record:
    """Milliseconds of `import fastloss` after `import torch`, the median of several interpreters."""
    script = "import time, torch; start = time.perf_counter(); import fastloss; print(time.perf_counter() - start)"
    times = [float(run(["-c", script])) * 1e3 for _ in range(settings.starts)]
    return [{"import_ms": statistics.median(times), "starts": len(times)}]


def error(settings: Settings, device: Device) -> Record:
    """Largest absolute error of loss and gradient against float64 on the same logits."""
    N, V = settings.record_shape
    rows = []
    for dtype in _DTYPES:
        x, target, _ = inputs(Case("plain", dtype, N // 4, V, True), device=device.device)
        exact = _loss_grad(F.cross_entropy, x.detach().double(), target)
        row: dict[str, Any] = {"case": f"{dtype} {N // 4}x{V}"}
        for name, loss in LOSSES.items():
            got = _loss_grad(loss, x.detach(), target)
            for part, g, e in zip(("loss", "grad"), got, exact, strict=True):
                row[f"{name}_{part}"] = (g.double() - e).abs().max().item()
        rows.append(row)
    return rows


def _loss_grad(loss: Callable[..., Tensor], x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = loss(x, target)
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


RECORDS: dict[str, Callable[[Settings, Device], Record]] = {
    "small calls": small_calls,
    "peak memory": peak_memory,
    "linear memory": linear_memory,
    "shared vocabulary": shared_vocabulary,
    "import time": import_time,
    "error": error,
}


# ---- processes of their own -----------------------------------------------------------------------------------------


def in_child(case: Case, settings: Settings) -> Result:
    """A case whose environment torch reads at its start."""
    plain = {name: value for name, value in vars(case).items() if name not in ("target", "environment")}
    answer = child("rounds", dict(case.environment), case=plain, rounds=settings.rounds, compiled=settings.compiled)
    return Result(case=case, **answer)
