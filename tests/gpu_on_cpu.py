"""Where a machine without a GPU finds what executes GPU code."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

_BESIDE = Path(__file__).resolve().parents[2] / "shared"


def find_ptxemu() -> ModuleType | None:
    """ptxemu, which executes PTX on the CPU: as installed, or from the folder `shared` beside this repository. None
    where it is not, or where NumPy is not, which it needs."""
    if find_spec("numpy") is None:
        return None
    try:
        return importlib.import_module("ptxemu")
    except ImportError:
        if not (_BESIDE / "ptxemu").is_dir():
            return None
    sys.path.append(str(_BESIDE))
    return importlib.import_module("ptxemu")
