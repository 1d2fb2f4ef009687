"""Stages `build` and `doctor`: fastloss compiled for the device at hand, and what it says of itself there."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .places import FAKE, ROOT, build_folder, native_modules, site
from .results import Skip, emit

_NEEDED = ("scikit_build_core", "pybind11")


def fingerprint() -> str:
    """Of everything that the built package is made of, and for whom."""
    digest = hashlib.sha256(sys.version.encode())
    files = [path for folder in ("csrc", "python") for path in (ROOT / folder).rglob("*") if path.suffix in _SOURCES]
    for path in sorted([*files, ROOT / "CMakeLists.txt", ROOT / "pyproject.toml"]):
        digest.update(str(path.relative_to(ROOT)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


_SOURCES = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh"}


def stamp() -> Path:
    """Holds the fingerprint of what is installed in site()."""
    return site() / "fastloss-build.txt"


def is_up_to_date() -> bool:
    """Whether what is installed there was built from these sources, for this Python."""
    built = all(path.exists() for path in native_modules())
    return built and stamp().exists() and stamp().read_text() == fingerprint()


def build() -> int:
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        names = ", ".join(name.replace("_", "-") for name in missing)
        emit("missing", {"ok": False, "packages": missing})
        print(
            f"the build needs {names}, which are not installed here: bring their wheels with --wheels DIR (docs/gpu.md)"
        )
        return 1
    architecture = None if FAKE else _architecture()
    command = pip_command(architecture)
    print(" ".join(command), flush=True)
    start = time.monotonic()
    if status := subprocess.call(command, cwd=ROOT):
        emit("installed", {"ok": False, "command": command, "status": status})
        return 1
    stamp().write_text(fingerprint())
    emit("installed", {"ok": True, "command": command, "seconds": round(time.monotonic() - start, 1)})
    if FAKE:  # the CUDA sources as C++ for the host, and the device that they run on
        from .target import backends, device

        emit("kernels", {"ok": backends() == ["cuda"], "device": str(device)})
        return 0
    said = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, env=_with_site())
    print(said.stdout, said.stderr)
    ok = said.returncode == 0 and said.stdout.split() == [architecture]
    emit("kernels", {"ok": ok, "architectures": said.stdout.split(), "expected": architecture})
    return 0 if ok else 1


_ASK = "from fastloss import _cuda; print(_cuda.architectures)"


def _with_site() -> dict[str, str]:
    from .places import environment

    return environment()


def _architecture() -> str:
    """The device's, as CMake counts: 90 for compute capability 9.0."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def pip_command(architecture: str | None) -> list[str]:
    """Installs this folder into site(), without the network. No `architecture`: without CUDA."""
    defines = ["FASTLOSS_CUDA=OFF"]
    if architecture is not None:
        defines = ["FASTLOSS_CUDA=ON", f"CMAKE_CUDA_ARCHITECTURES={architecture}-real"]
    options = [option for define in defines for option in ("-C", f"cmake.define.{define}")]
    return [
        *(sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"),
        *("--disable-pip-version-check", "--upgrade", "--target", str(site()), *options),
        *("-C", f"build-dir={build_folder() / 'objects'}", str(ROOT)),
    ]


# ---- doctor ----------------------------------------------------------------------------------------------------------


def doctor() -> int:
    entrance = [str(ROOT / "tests" / "fake_gpu_bench.py")] if FAKE else ["-m", "fastloss"]
    done = subprocess.run([sys.executable, *entrance, "doctor", "--json"], capture_output=True, text=True)
    print(done.stdout, done.stderr)
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        emit("doctor", {"ok": False, "error": done.stderr[-2000:]})
        return 1
    tested = sorted({test["backend"] for test in report["self_test"] if test["device"] != "cpu"})
    if not tested:
        report["error"] = "no backend was tested on the device"
    emit("doctor", {"ok": done.returncode == 0 and bool(tested), "tested_on_device": tested, **report})
    return 0


__all__ = ["Skip", "build", "doctor", "fingerprint", "is_up_to_date", "pip_command", "stamp"]
