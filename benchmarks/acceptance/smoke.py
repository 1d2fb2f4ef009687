"""Stage `smoke`: each kind of call beside the textbook in float64, on the device, within a minute and a half.

An error may be as large as that of the same textbook formula in the call's own dtype, and the roundings that tests
allow.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import CASES, LOSS_CASES, TOLERANCE, Case
from check import error, to, value_and_grad
from torch import Tensor

from .results import already, emit, is_done
from .target import FAKE, backends, bench_device, device, fastloss, occupy, synchronize

_VOCABULARIES = (503, 5003) if FAKE else (32000, 50257, 128256, 262144, 900000)
_ODD = 5003 if FAKE else 50257  # rows at odd addresses
_ROWS = 16
_KINDS = (
    "smoothing", "weight", "everything", "probabilities", "softcap_logit_scale", "forward_kl", "reverse_kl", "js",
    "topk", "topk_tail", "log_probs",
)  # fmt: skip
_TABLE = {case.name: case for case in (*CASES, *LOSS_CASES)}
_DTYPES = (torch.bfloat16, torch.float32)
_LARGE = (64, 1009) if FAKE else (17001, 128256)  # more than 2^31 logits


def smoke() -> int:
    checks = _checks()
    done = already("smoke")
    for name, check in checks.items():
        if is_done(done.get(name)) or name in _TRIED:
            continue
        start = time.monotonic()
        try:
            found = check()
        except Exception as why:
            traceback.print_exc()
            emit(name, {"ok": False, "error": f"{type(why).__name__}: {str(why)[:500]}"})
            if _is_lost(why):  # every later call would fail with it
                os.environ["FASTLOSS_GPU_TRIED"] = "\n".join([*_TRIED, *list(checks)[: list(checks).index(name) + 1]])
                os.execv(sys.executable, [sys.executable, "-m", "acceptance.stages", "smoke"])
        else:
            found = {"seconds": round(time.monotonic() - start, 2), **found}
            print(name, found, flush=True)
            emit(name, found)
    return 0


# What a process that lost its device has tried before this one.
_TRIED = set(filter(None, os.environ.get("FASTLOSS_GPU_TRIED", "").split("\n")))


def _is_lost(why: Exception) -> bool:
    return "CUDA error" in str(why) or type(why).__name__ == "AcceleratorError"


def _checks() -> dict[str, Callable[[], dict[str, Any]]]:
    checks: dict[str, Callable[[], dict[str, Any]]] = {}
    for backend in backends():
        for V in _VOCABULARIES:
            for dtype in _DTYPES:
                checks[f"{backend}: plain {_name(dtype)}, V = {V}"] = _beside_float64(
                    backend, _TABLE["index"], V, dtype
                )
        for kind in _KINDS:
            checks[f"{backend}: {kind} bfloat16, V = {_ODD}"] = _beside_float64(
                backend, _TABLE[kind], _ODD, torch.bfloat16
            )
        for name, check in (("linear", _linear), ("linear, per row", _linear_per_row), ("inplace", _inplace)):
            checks[f"{backend}: {name}"] = _with(backend, check)
    checks["clusters"] = _clusters
    checks[f"more logits than 2^31: {_LARGE[0]} x {_LARGE[1]}" if not FAKE else "many logits"] = _large
    for name in ("capture", "label"):
        checks[f"{name}, in a process of its own"] = _alone(name)
    checks["side stream"] = _side_stream
    checks["torch.compile(fullgraph=True)"] = _fullgraph
    checks["ceilings"] = _ceilings
    return checks


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _with(backend: str, check: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        with fastloss.use_backend(backend):
            return check()

    return run


def _moved(value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def compare(
    ours: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    x: Tensor,
    target: Tensor,
    options: dict[str, Any],
    upstream: Tensor | None = None,
) -> dict[str, Any]:
    """Errors of loss and gradient beside float64, over the largest value, and what is allowed. All on the device."""

    def textbook(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        exact = {name: to(value, dtype) for name, value in options.items()}
        with torch.device(device):  # where the textbook makes its tensors
            return value_and_grad(oracle, x.to(dtype), to(upstream, dtype), to(target, dtype), **exact)

    got = value_and_grad(ours, x, upstream, target, **options)
    truth, same = textbook(torch.float64), textbook(x.dtype)
    found: dict[str, Any] = {"ok": True}
    for name, floor, a, b, t in zip(("loss", "gradient"), (1.0, 1.0 / len(x)), got, same, truth, strict=True):
        allowed = error(b, t, floor)
        allowed = TOLERANCE[x.dtype] + (allowed if allowed < float("inf") else 0.0)
        found[name], found[f"{name} allowed"] = error(a, t, floor), allowed
        found["ok"] = found["ok"] and found[name] <= allowed
    return found


def _beside_float64(backend: str, case: Case, V: int, dtype: torch.dtype) -> Callable[[], dict[str, Any]]:
    def check() -> dict[str, Any]:
        g = torch.Generator().manual_seed(20)
        x, y, options = case.inputs(_ROWS, V, dtype, g)
        upstream = case.upstream(_ROWS, g) if case.function == "selective_log_softmax" else None
        options = {name: _moved(value) for name, value in options.items()}
        return compare(case.loss(), case.oracle, _moved(x), _moved(y), options, _moved(upstream))

    return _with(backend, check)


def _indices(N: int, V: int) -> tuple[Tensor, Tensor]:
    """Logits and labels on the device."""
    g = torch.Generator().manual_seed(21)
    return _moved((torch.randn(N, V, generator=g) * 3).bfloat16()), _moved(torch.randint(V, (N,), generator=g))


def _head() -> tuple[Tensor, Tensor, Tensor]:
    N, H, V = (8, 16, 300) if FAKE else (512, 512, 32000)
    g = torch.Generator().manual_seed(22)
    weight = (torch.randn(V, H, generator=g) * H**-0.5).bfloat16()
    return (
        _moved(torch.randn(N, H, generator=g).bfloat16()),
        _moved(weight),
        _moved(torch.randint(V, (N,), generator=g)),
    )


def _textbook_linear(x: Tensor, y: Tensor, weight: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(x @ weight.t(), y, reduction=reduction)


def _linear(reduction: str = "mean") -> dict[str, Any]:
    """Gradients of the hidden states and of the weight."""
    x, weight, y = _head()
    ours = lambda x, y, weight: fastloss.linear_cross_entropy(x, weight, y, reduction=reduction)  # noqa: E731
    theirs = lambda x, y, weight: _textbook_linear(x, y, weight, reduction)  # noqa: E731
    of_weight = [lambda w, y, hidden, f=f: f(hidden, y, w) for f in (ours, theirs)]
    upstream = None if reduction == "mean" else _moved(torch.rand(len(x)) + 0.5)
    found = [compare(ours, theirs, x, y, {"weight": weight}, upstream)]
    found.append(compare(*of_weight, weight, y, {"hidden": x}, upstream))
    return {"ok": all(f["ok"] for f in found), "hidden states": found[0], "weight": found[1]}


def _linear_per_row() -> dict[str, Any]:
    return _linear("none")


def _inplace() -> dict[str, Any]:
    """The gradient lies where the logits lay."""
    x, y = _indices(_ROWS, _ODD)
    truth = value_and_grad(F.cross_entropy, x.double(), None, y)
    same = value_and_grad(F.cross_entropy, x, None, y)
    leaf = x.clone().requires_grad_()
    logits = leaf * 1
    loss = fastloss.cross_entropy(logits, y, inplace=True)
    loss.backward()
    grad, floor = leaf.grad, 1.0 / len(x)
    assert grad is not None
    found, allowed = error(grad, truth[1], floor), error(same[1], truth[1], floor) + TOLERANCE[x.dtype]
    return {"ok": found <= allowed, "gradient": found, "gradient allowed": allowed}


def _clusters() -> dict[str, Any]:
    """How many blocks share a row on chip, by V, for bfloat16."""
    if "cuda" not in backends():
        return {"ok": True, "slices": "the backend cuda does not run here"}
    from fastloss.backends import cuda
    from fastloss.backends.native import DTYPE_CODES

    built, code = cuda.module(), DTYPE_CODES[torch.bfloat16]
    rows = (8000, 32000, 50257, 65536, 128256, 262144, 900000)
    return {"ok": True, "slices": {str(V): built.chip_slices(device.index or 0, V, code, 0, 1) for V in rows}}


def _large() -> dict[str, Any]:
    """Losses and gradients of the first, a middle and the last row, where offsets exceed 31 bits: statistics and
    gradient apart, and both in one kernel."""
    N, V = _LARGE
    x = torch.empty(N, V, dtype=torch.bfloat16, device=device).normal_().requires_grad_()
    y, some = torch.randint(V, (N,), device=device), [0, N // 2, N - 1]
    ones = torch.ones(3, device=device)
    truth = value_and_grad(F.cross_entropy, x.detach()[some].double(), ones, y[some], reduction="none")
    found: dict[str, Any] = {"logits": N * V}
    for reduction in ("none", "sum"):
        x.grad = None
        loss = fastloss.cross_entropy(x, y, reduction=reduction)
        loss.sum().backward()
        assert x.grad is not None
        found[f"gradient, {reduction}"] = error(x.grad[some], truth[1], 1.0)
        if reduction == "none":
            found["loss"] = error(loss.detach()[some], truth[0], 1.0)
    return {"ok": all(value <= 2**-7 for name, value in found.items() if name != "logits"), **found}


def _side_stream() -> dict[str, Any]:
    """A stream of the caller's, while the default stream is busy."""
    if FAKE:
        return {"ok": True, "note": "the fake device has no streams"}
    x, y = _indices(256, 32000)
    synchronize()
    stream = torch.cuda.Stream()
    occupy(50)
    with torch.cuda.stream(stream):
        late = (x.float() * 0.5).bfloat16()
        found = compare(fastloss.cross_entropy, F.cross_entropy, late, y, {})
    stream.synchronize()
    synchronize()
    return found


def _fullgraph() -> dict[str, Any]:
    if FAKE:
        return {"ok": True, "note": "torch.compile knows no fake device"}
    compiled = torch.compile(lambda x, y: fastloss.cross_entropy(x, y), fullgraph=True)
    return compare(compiled, F.cross_entropy, *_indices(_ROWS, 32000), {})


def _alone(name: str) -> Callable[[], dict[str, Any]]:
    """A check that wants a device that nothing was launched on, or leaves one that nothing can be launched on."""

    def check() -> dict[str, Any]:
        command = [sys.executable, "-m", "acceptance.alone", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        said = (done.stdout + done.stderr).strip()
        return {"ok": done.returncode == 0, "said": said[-500:], "status": done.returncode}

    return check


def _ceilings() -> dict[str, Any]:
    """What a copy and a matmul reach here: the measure of everything else."""
    on = bench_device()
    size, side = (1 << 16, 64) if FAKE else (1 << 30, 8192)
    a = torch.empty(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    x = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy, matmul = _median(on, lambda: b.copy_(a)), _median(on, lambda: torch.mm(x, x, out=y))
    return {"ok": True, "copy_gb_per_s": 2 * size / copy / 1e9, "matmul_tflop_per_s": 2 * side**3 / matmul / 1e12}


def _median(on: Any, call: Callable[[], object]) -> float:
    marks = []
    for _ in range(13):
        on.occupy()
        start = on.mark()
        call()
        marks.append((start, on.mark()))
    on.wait()
    return sorted(on.seconds(*pair) for pair in marks[3:])[5]
