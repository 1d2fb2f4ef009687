"""Where a machine without a GPU finds what executes GPU code."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

_BESIDE = Path(__file__).resolve().parents[2] / "shared"


def find_ptxemu() -> ModuleType | None:
    """ptxemu, which executes PTX on the CPU: as installed, or from the folder `shared` beside this repository."""
    try:
        return importlib.import_module("ptxemu")
    except ImportError:
        if not (_BESIDE / "ptxemu").is_dir():
            return None
    sys.path.append(str(_BESIDE))
    return importlib.import_module("ptxemu")
