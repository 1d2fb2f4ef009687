"""What this installation is: builds, instruction sets, the backend of each kind of call, and whether they are right."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fastloss

from .backends import BACKENDS, cuda, native, refusals, use_backend
from .spec import Objective

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_VARIABLES = ("FASTLOSS_BACKEND", "FASTLOSS_ISA", "THP_MEM_ALLOC_ENABLE", "OMP_NUM_THREADS")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The largest error allowed in the self-test, over the largest value: a few roundings of the result's dtype.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-13}


def main(as_json: bool = False) -> int:
    """Prints the examination; 1 if a self-test failed or nothing could be tested."""
    report = examine()
    print(json.dumps(report, indent=2)) if as_json else _show(report)
    return 0 if report["healthy"] else 1


def examine() -> dict[str, Any]:
    """Everything `doctor` says, as plain values."""
    tests = self_test()
    return {
        "build": build_facts(),
        "machine": machine_facts(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "backends": [_choice(device, dtype) for device in _devices() for dtype in _DTYPES],
        "self_test": tests,
        "healthy": bool(tests) and all(test["passed"] for test in tests),
    }


def build_facts() -> dict[str, Any]:
    """Versions, and what the native module was compiled with; only `native` where it is not built."""
    facts: dict[str, Any] = {
        "fastloss": fastloss.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": _cuda_facts(),
        "triton": _version("triton"),
    }
    module = native._native
    if module is None:
        return facts | {"native": f"not built: {native._import_error}"}
    return facts | {
        "native": module.version,
        "compiler": module.compiler,
        "isas_compiled": module.compiled_isas.split(),
        "isas_available": list(module.available_isas()),
        "isa": module.current_isa(),
        "team": module.team_kind(),
    }


def _cuda_facts() -> str:
    built = cuda.module()
    if isinstance(built, str):
        return built
    return f"kernels for compute capabilities {built.architectures.replace(' ', ', ')}; {built.driver_report()}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def machine_facts() -> dict[str, Any]:
    """The processor, its memory, and the settings that decide the speed of a loss."""
    pages = _HUGE_PAGES.read_text().strip() if _HUGE_PAGES.exists() else "not a setting of this system"
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch_threads": torch.get_num_threads(),
        "accelerator": _accelerator_facts(),
        "huge_pages": pages,
    }


def _accelerator_facts() -> str:
    built_for = torch.accelerator.current_accelerator()
    if built_for is None:
        return "none: this torch is built for CPUs"
    if torch.accelerator.current_accelerator(check_available=True) is None:
        return f"none: this torch is built for {built_for.type}, but finds no device, or no driver for it"
    module = getattr(torch, built_for.type)
    return ", ".join(module.get_device_name(i) for i in range(torch.accelerator.device_count()))


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _devices() -> list[torch.device]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)  # None without one, or its driver
    return [torch.device("cpu")] + ([accelerator] if accelerator is not None else [])


def _choice(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    reasons = refusals(device, dtype, torch.int64)
    chosen = next((name for name, reason in reasons.items() if reason is None), None)
    others = {
        name: reason or f"would run, but {chosen} comes first" for name, reason in reasons.items() if name != chosen
    }
    return {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "chosen": chosen, "others": others}


# ---- self-test ------------------------------------------------------------------------------------------------------


def self_test() -> list[dict[str, Any]]:
    """cross_entropy against F.cross_entropy in float64, on every device and backend that would run it: the native
    kernels on each instruction set."""
    results = []
    for device in _devices():
        for backend in BACKENDS:
            if backend.refuses(device, torch.float32, torch.int64, Objective.INDEX) is not None:
                continue
            with use_backend(backend.name):
                if backend.name == "cpu":
                    results += _test_isas(device)
                else:
                    results.append(_test(backend.name, None, device))
    return results


def _test_isas(device: torch.device) -> list[dict[str, Any]]:
    before = native._native.current_isa()
    results = []
    try:
        for isa in native._native.available_isas():
            native._native.use_isa(isa)
            results.append(_test("cpu", isa, device))
    finally:
        native._native.use_isa(before)
    return results


def _test(backend: str, isa: str | None, device: torch.device) -> dict[str, Any]:
    errors, passed = {}, True
    for dtype in _DTYPES:
        loss, grad = _errors(dtype, device)
        errors[str(dtype).removeprefix("torch.")] = {"loss": loss, "grad": grad}
        passed &= max(loss, grad) <= _TOLERANCE[dtype]  # False for NaN too
    return {"backend": backend, "isa": isa, "device": str(device), "passed": passed, "errors": errors}


def _errors(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Largest error of loss and gradient over their largest value; odd sizes, an ignored row, masked classes."""
    generator = torch.Generator().manual_seed(0)
    N, V = 37, 3001
    x = (torch.randn(N, V, generator=generator, dtype=torch.float64, device=generator.device) * 4).to(dtype)
    x[:, -7:] = -torch.inf
    target = torch.randint(0, V - 7, (N,), generator=generator, device=generator.device)
    target[3] = -100

    x, target = x.to(device), target.to(device)

    def run(loss: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.clone().requires_grad_()
        value = loss(logits, target)
        value.backward()
        return value.detach().double(), logits.grad.double()  # type: ignore[union-attr]

    with torch.enable_grad():
        expected, got = run(F.cross_entropy, x.double()), run(fastloss.cross_entropy, x)
    loss, grad = (((g - e).abs().max() / e.abs().max()).item() for g, e in zip(got, expected, strict=True))
    return loss, grad


# ---- output ---------------------------------------------------------------------------------------------------------


def _show(report: dict[str, Any]) -> None:
    facts = [*report["build"].items(), *report["machine"].items(), *report["environment"].items()]
    rows = [(name, " ".join(value) if isinstance(value, list) else str(value)) for name, value in facts]
    if not report["environment"]:
        rows.append(("environment", "no variable set that fastloss reads"))
    _table("installation", ("", ""), rows)
    choices = [
        (c["device"], c["dtype"], c["chosen"] or "none", "; ".join(f"{n}: {r}" for n, r in c["others"].items()))
        for c in report["backends"]
    ]
    _table("backend of a call", ("device", "dtype", "chosen", "the others"), choices)
    tests = [
        (t["backend"], t["isa"] or t["device"], "ok" if t["passed"] else "FAILED", _worst(t["errors"]))
        for t in report["self_test"]
    ]
    _table("self-test: largest relative error against float64", ("backend", "on", "", "loss / gradient"), tests)
    print("healthy" if report["healthy"] else "NOT healthy: a self-test failed, or nothing could be tested")


def _worst(errors: dict[str, dict[str, float]]) -> str:
    return "   ".join(f"{dtype} {e['loss']:.0e} / {e['grad']:.0e}" for dtype, e in errors.items())


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # an optional extra: torch is fastloss's only dependency
        return _plain(title, columns, rows)
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(text.replace("[", "\\[") for text in row))
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a pipe has no width; do not fold what is read by programs and logs
    console.print(table)
    return None


def _plain(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    lines = [columns, *rows] if any(columns) else rows
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    print(title)
    for line in lines:
        print("  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    print()
