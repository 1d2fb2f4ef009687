"""Packages that an offline machine lacks, from a folder of wheels that was carried there."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from .places import tools


def missing(folder: Path) -> list[Path]:
    """The folder's wheels whose package is not installed, here or in tools()."""
    here = [*sys.path, str(tools())]
    return [wheel for wheel in sorted(folder.glob("*.whl")) if not _installed(wheel.name.partition("-")[0], here)]


def _installed(name: str, path: list[str]) -> bool:
    return any(metadata.distributions(name=name.replace("_", "-"), path=path))


def install(folder: Path) -> dict[str, str]:
    """Installs them into tools(); what pip said of each that it refused. One at a time if not all at once: a wheel for
    another Python must not keep the others away."""
    if not folder.is_dir():
        return {str(folder): "there is no such folder"}
    wheels = missing(folder)
    if not wheels or _pip(wheels) is None:
        return {}
    said = {wheel.name: _pip([wheel]) for wheel in wheels}
    return {name: reason for name, reason in said.items() if reason is not None}


def _pip(wheels: list[Path]) -> str | None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check"]
    options = ["--no-compile", "--upgrade", "--target", str(tools())]
    done = subprocess.run([*command, *options, *map(str, wheels)], capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip failed"])[-1][:300]
