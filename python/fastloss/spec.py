"""What one call asks for, apart from its tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


class Spec(NamedTuple):
    """The numbers that shape a loss over a vocabulary; the same for all rows."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0  # 0: none
    logit_scale: float = 1.0


@lru_cache(maxsize=256)
def make_spec(
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, logit_scale: float
) -> Spec:
    """A checked `Spec`; cached, since a training run asks for the same one at every step."""
    if not isinstance(ignore_index, int):
        raise TypeError(f"cross_entropy(): argument 'ignore_index' must be int, not {type(ignore_index).__name__}")
    for name, value in (("label_smoothing", label_smoothing), ("z_loss", z_loss), ("logit_scale", logit_scale)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"cross_entropy(): argument '{name}' must be float, not {type(value).__name__}")
    if label_smoothing > 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a number > 0, or None for no cap, got {softcap}")
    if not logit_scale > 0:
        raise ValueError(f"logit_scale: expected a number > 0, got {logit_scale}")
    # torch ignores a label_smoothing that is not above zero; so must a drop-in.
    smoothing = float(label_smoothing) if label_smoothing > 0 else 0.0
    return Spec(ignore_index, smoothing, float(z_loss), float(softcap or 0.0), float(logit_scale))
