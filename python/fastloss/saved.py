"""What an autograd Function keeps for its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_is_compiling = torch.compiler.is_compiling


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """As ctx.save_for_backward. Tensors made under inference_mode, a teacher's logits say, it refuses: they can need no
    gradient, and are held without it and without a copy."""
    ctx.held = None
    if not _is_compiling():
        for t in tensors:
            if t is not None and t.is_inference():
                ctx.held = [t if t is not None and t.is_inference() else None for t in tensors]
                tensors = tuple(None if held is not None else t for held, t in zip(ctx.held, tensors, strict=True))
                break
    ctx.save_for_backward(*tensors)


def saved(ctx: Any) -> Any:
    """The tensors that were saved, in their order."""
    tensors = ctx.saved_tensors
    if ctx.held is None:
        return tensors
    return tuple(t if held is None else held for held, t in zip(ctx.held, tensors, strict=True))


def savable(x: Tensor) -> Tensor:
    """As autograd's own operations take it: a copy of an inference tensor. For vectors, and what a formula reads."""
    return x.clone() if not _is_compiling() and x.is_inference() else x
