"""The CUDA backend without a GPU: its sources compiled for the host (tests/cuda_on_host.h), kernels run there, or each
launch handed to an emulator of the PTX that nvcc makes of the same sources."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import fastloss
from fastloss.backends import cuda, force

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda_on_host"
ELEMENTS = {"float32": "Float32", "float64": "Float64", "bfloat16": "BFloat16", "float16": "Float16"}
# (compute capability, bytes of shared memory a block may have): what decides how rows are cut.
DEVICES = {"sm_80": (8, 0, 166912), "sm_90": (9, 0, 232448), "sm_120": (12, 0, 101376)}


def element_flags(name: str) -> list[str]:
    """What CMakeLists.txt defines when it compiles rows.cu for an element type."""
    return [f"-DFASTLOSS_ELEMENT={ELEMENTS[name]}", f"-DFASTLOSS_KERNELS={name}_kernels", f"-DFASTLOSS_ISA=cuda_{name}"]


def fingerprint(*parts: str) -> str:
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in sorted([*(ROOT / "csrc").rglob("*"), *(ROOT / "tests").glob("cuda_on_host*")]):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not found:
        raise FileNotFoundError("a C++ compiler")
    return found


@lru_cache(maxsize=1)
def host_library() -> Path:
    """The shared library of fastloss._cuda for the host; compiled when a source has changed."""
    import sysconfig

    import pybind11

    flags = [
        "-std=c++17",
        "-O2",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        "-Wno-unknown-pragmas",
        "-Werror",
        "-x",
        "c++",
    ]
    flags += ["-DFASTLOSS_CUDA_ON_HOST", "-include", str(ROOT / "tests" / "cuda_on_host.h")]
    flags += ["-DFASTLOSS_MODULE=_cuda", '-DFASTLOSS_CUDA_ARCHITECTURES="host"']
    flags += ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    folder = BUILD / fingerprint(compiler(), sys.version, *flags)
    library = folder / "fastloss_cuda_on_host.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    units = [(SOURCES / "rows.cu", name, element_flags(name)) for name in ELEMENTS]
    units += [(SOURCES / "launch.cu", "launch", ["-DFASTLOSS_ISA=cuda_host"])]
    units += [(ROOT / "tests" / "cuda_on_host_module.cpp", "module", ["-DFASTLOSS_ISA=cuda_host"])]

    def compile_unit(unit: tuple[Path, str, list[str]]) -> str:
        source, name, more = unit
        output = str(folder / f"{name}.o")
        run([compiler(), *flags, *more, "-c", str(source), "-o", output])
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_unit, units))
    part = folder / f"{os.getpid()}.part"
    run([compiler(), "-shared", *objects, "-ldl", "-o", str(part)])
    part.replace(library)
    return library


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _load(name: str) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, str(host_library()))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@lru_cache(maxsize=1)
def _modules() -> tuple[Any, Any] | Exception:
    try:
        return _load("_cuda"), _load("cuda_on_host_control")
    except Exception as error:  # kept, or every test would compile again what does not compile
        return error


def modules() -> tuple[Any, Any]:
    """(fastloss._cuda for the host, the controls of tests/cuda_on_host_module.cpp)."""
    found = _modules()
    if isinstance(found, Exception):
        raise found
    return found


@contextmanager
def cuda_on_host(device: str = "sm_80", launcher: Any = None) -> Iterator[Any]:
    """The cuda backend takes CPU tensors inside, and is the only backend; yields the controls."""
    built, control = modules()
    real = cuda.module
    cuda.module = lambda: built  # type: ignore[assignment]
    control.set_device(*DEVICES[device])
    control.set_launcher(launcher)
    cuda._chip_slices.cache_clear()
    force(None)  # forgets what was chosen
    try:
        with fastloss.use_backend("cuda"):
            yield control
    finally:
        cuda.module = real
        control.set_launcher(None)
        cuda._chip_slices.cache_clear()
        force(None)
