"""Stages `build` and `doctor`: fastloss compiled for the device at hand, and what it says of itself there."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from typing import Any

from .places import FAKE, ROOT, build_folder, environment, fastloss_command, fingerprint, site, stamp
from .results import emit

_NEEDED = ("scikit_build_core", "pybind11")


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
    said = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, env=environment())
    print(said.stdout, said.stderr)
    ok = said.returncode == 0 and said.stdout.split() == [architecture]
    emit("kernels", {"ok": ok, "architectures": said.stdout.split(), "expected": architecture})
    return 0 if ok else 1


_ASK = "from fastloss import _cuda; print(_cuda.architectures)"


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
    done = subprocess.run([*fastloss_command(), "doctor", "--json"], capture_output=True, text=True)
    print(done.stdout, done.stderr)
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        emit("doctor", {"ok": False, "error": done.stderr[-2000:]})
        return 1
    tested = sorted({test["backend"] for test in report["self_test"] if test["device"] != "cpu"})
    if "cuda" not in tested:
        report["error"] = "the backend cuda was not tested on the device"
    emit("doctor", {"ok": done.returncode == 0 and "cuda" in tested, "tested_on_device": tested, **report})
    return 0
