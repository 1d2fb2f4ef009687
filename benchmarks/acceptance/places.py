"""Where things lie, and what the stages' processes are started with. Imports neither torch nor fastloss."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAKE = os.environ.get("FASTLOSS_FAKE_GPU") == "1"  # a dry run, on the fake device of the tests
_SOURCES = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh"}
_FAKE_TOOLS = ROOT / "tests" / "fake_tools"


def fastloss_command() -> list[str]:
    """`python -m fastloss`, in a dry run on the fake device."""
    return [sys.executable, *([str(ROOT / "tests" / "fake_gpu_bench.py")] if FAKE else ["-m", "fastloss"])]


def build_folder() -> Path:
    """For what the stages make and nobody needs later. On the device machine only a few files come back."""
    return ROOT / "build" / ("gpu-fake" if FAKE else "gpu")


def site() -> Path:
    """Where the stage `build` installs fastloss."""
    return build_folder() / "site"


def tools() -> Path:
    """Where the packages of --wheels are installed."""
    return build_folder() / "tools"


def native_modules() -> list[Path]:
    """What the stage `build` must have left for this Python."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return [site() / "fastloss" / f"{name}{suffix}" for name in (("_native",) if FAKE else ("_native", "_cuda"))]


def fingerprint() -> str:
    """Of everything that the built package is made of, and for whom."""
    digest = hashlib.sha256(sys.version.encode())
    files = [path for folder in ("csrc", "python") for path in (ROOT / folder).rglob("*") if path.suffix in _SOURCES]
    for path in sorted([*files, ROOT / "CMakeLists.txt", ROOT / "pyproject.toml"]):
        digest.update(str(path.relative_to(ROOT)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def stamp() -> Path:
    """Holds the fingerprint of what is installed in site()."""
    return site() / "fastloss-build.txt"


def is_up_to_date() -> bool:
    """Whether what is installed there was built from these sources, for this Python."""
    built = all(path.exists() for path in native_modules())
    return built and stamp().exists() and stamp().read_text() == fingerprint()


def environment() -> dict[str, str]:
    """Of a stage's process. What was built comes first; with nothing built, the sources, and in a dry run what the
    caller would import."""
    packages = [site()] if is_up_to_date() else []  # never what was built from other sources
    python_path = [*packages, tools(), ROOT / "benchmarks", ROOT / "tests", *_listed("PYTHONPATH")]
    if not packages and not (FAKE and find_spec("fastloss")):  # never an older version that is installed
        python_path.append(ROOT / "python")
    programs = [*([_FAKE_TOOLS] if FAKE else []), tools() / "bin", Path(sys.executable).parent, *_cuda_programs()]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, python_path)),
        "PATH": os.pathsep.join(map(str, [*programs, os.environ.get("PATH", os.defpath)])),
        "PYTHONUNBUFFERED": "1",
        "FASTLOSS_FAKE_GPU": "1" if FAKE else "0",
    }


def _listed(name: str) -> list[str]:
    return [entry for entry in os.environ.get(name, "").split(os.pathsep) if entry]


def _cuda_programs() -> list[Path]:
    """Where NVIDIA puts nvcc, ncu and compute-sanitizer, newest first: behind what is on the PATH already."""
    found = [Path("/usr/local/cuda/bin"), *sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)]
    return [path for path in found if path.is_dir()]
