"""The Triton kernels, for every GPU that Triton knows. Triton itself is imported with the first call that needs it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ...spec import COMPUTE_DTYPE, Objective, Rows
from ..device import Kernels

# Where Triton's kernels run. Who executes them elsewhere, as the tests do, adds a device type.
device_types = {"cuda", "xpu"}


def refuses(device: torch.device, dtype: torch.dtype, target_dtype: torch.dtype, objective: Objective) -> str | None:
    """Why these kernels cannot run such a call; None if they can."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type not in device_types and not interpreted:
        return f"runs on {' and '.join(sorted(device_types))} tensors, not on {device.type}"
    nvidia = device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available()
    if nvidia and torch.cuda.get_device_capability(device) < (7, 0):
        return "needs compute capability 7.0"
    if dtype not in COMPUTE_DTYPE:
        return f"takes float32, bfloat16, float16 or float64, not {dtype}"
    return None


def takes_head(rows: Rows, hidden: Tensor, head: Tensor) -> bool:
    """16-bit operands, whose products tensor cores sum in float32; other dtypes are the library's."""
    alike = hidden.dtype in _OF_HEADS and head.dtype == hidden.dtype
    return alike and rows.spec.objective == Objective.INDEX


_OF_HEADS = (torch.bfloat16, torch.float16)


@lru_cache(maxsize=1)
def kernels() -> Kernels:
    """What launches them."""
    from . import heads, listed, pairs, rows

    def by_objective(name: str) -> Callable[..., Any]:
        def launch(given: Rows, *args: Any) -> Any:
            family = pairs if given.spec.objective.paired else listed if given.probs is not None else rows
            return getattr(family, name)(given, *args)

        return launch

    of_objectives = ("on_chip", "row_stats", "row_grad", "row_loss_grad")
    launches = {name: by_objective(name) for name in of_objectives}
    of_heads = ("head_stats", "head_tiles", "head_grad", "kept_product")
    launches |= {name: getattr(heads, name) for name in of_heads}
    launches["takes_head"] = takes_head
    return Kernels(*(launches.get(name) or getattr(rows, name) for name in Kernels._fields))
