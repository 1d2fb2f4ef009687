"""How many Triton kernels `pytest -m gpu` has a GPU compile, counted without one:

    FASTLOSS_FAKE_GPU=1 python -m pytest -p triton_variants -m gpu -k triton tests

Launches of the triton backend are written down, each with what Triton compiles a kernel for; what they would compute is
computed by the CUDA sources on the fake device, so that tests go on. Those fail that look at what Triton alone does,
such as which tiles it leaves out; processes of their own are not seen.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import engines
import gpu_device
import pytest
import torch
from fake_gpu import NAME
from gpu_device import DEVICE
from triton_engine import in_shapes

import fastloss
from fastloss import backends
from fastloss.backends import cuda
from fastloss.backends import triton as backend
from fastloss.backends.device import Kernels

assert DEVICE is not None
engines.GPUS.append("triton:gpu")
engines.ENGINES.append(pytest.param("triton:gpu", marks=pytest.mark.gpu))
engines.emulated = lambda **_: fastloss.use_backend("triton")  # type: ignore[assignment,misc]
gpu_device.BACKENDS = ("cuda", "triton")
backend.device_types.add(NAME)

TARGET = ("cuda", 90, 32)
_found: dict[tuple[str, str], str] = {}  # (kernel, what it is compiled for) -> the test that needs it first
_test = ""


def _record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """In place of JITFunction.run."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    bind = _binders.get(self)
    if bind is None:
        compiler = make_backend(GPUTarget(*TARGET))
        bind = _binders[self] = create_function_from_signature(self.signature, self.params, compiler)
    _, specialization, given = bind(*args, **options)
    _found.setdefault((self.__name__, f"{specialization} {sorted(given.items())}"), _test)


_binders: dict[Any, Any] = {}


def _both(first: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        first(*args)
        return then(*args)

    return launch


def _of_logits(name: str) -> Callable[..., Any]:
    """A kernel of LM heads, by the CUDA kernels of logits."""

    def logits(hidden: Any, head: Any, bias: Any) -> Any:
        z = hidden.float() @ head.float().t()
        return z if bias is None else z + bias

    def head_stats(
        rows: Any, hidden: Any, head: Any, bias: Any, loss: Any, stats: Any, argmax: Any, order: Any
    ) -> None:
        rank = None if argmax is None else torch.empty_like(argmax)
        cuda._row_stats(rows._replace(input=logits(hidden, head, bias)), loss, stats, argmax, rank)

    def head_grad(
        rows: Any, hidden: Any, head: Any, bias: Any, stats: Any, upstream: Any, grad: Any, kept: Any, eps: float
    ) -> None:
        z = logits(hidden, head, bias)
        wide = torch.empty_like(z)
        cuda._row_grad(rows._replace(input=z), stats, upstream, wide, False)
        grad.copy_(wide)
        if kept is not None:
            kept.fill_(1)

    def kept_product(grad: Any, tiles: Any, other: Any, out: Any, add: bool) -> None:
        product = grad.float() @ other.float()
        out.copy_(out + product if add else product)

    return {"head_stats": head_stats, "head_grad": head_grad, "kept_product": kept_product}[name]


def _kernels() -> Kernels:
    launched, computed = _triton(), cuda.kernels()
    fields = {}
    for name, launch in launched._asdict().items():
        if name in ("head_stats", "head_grad", "kept_product"):
            fields[name] = _both(launch, _of_logits(name))
        elif name in ("on_chip", "takes_head", "head_tiles"):
            fields[name] = launch
        else:
            fields[name] = _both(launch, getattr(computed, name))
    return Kernels(**fields)


_triton = backend.kernels
backends.BACKENDS = tuple(
    backends._on_device(b.name, b.runs_on, b.refuses, _kernels) if b.name == "triton" else b for b in backends.BACKENDS
)


@pytest.fixture(autouse=True)
def _counted(request: pytest.FixtureRequest) -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    global _test
    _test = request.node.nodeid
    # Each launch would be in the shape that is the fastest of all, which are compiled to be timed.
    with patch.object(JITFunction, "run", _record), in_shapes(lambda shapes: shapes):
        yield


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Kernels, and the tests that are the first to need them."""
    write = terminalreporter.write_line
    write(f"{len(_found)} kernels of Triton")
    for kernel, number in Counter(name for name, _ in _found).most_common():
        write(f"{number:6d} {kernel}")
    for test, number in Counter(test.partition("[")[0] for test in _found.values()).most_common():
        write(f"{number:6d} {test}")
    if folder := os.environ.get("FASTLOSS_VARIANTS"):
        lines = ["\t".join((test, *key)) for key, test in _found.items()]
        Path(folder).write_text("\n".join(lines))
