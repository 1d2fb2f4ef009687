"""Matrix products as torch's own library computes them: for the backends that have none, or slower ones."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor, out: Tensor, add: bool = False, start: Tensor | None = None) -> None:
    """`out` (M, N) = a (M, K) @ b (K, N) + start (N,); with `add` out += a @ b. Operands of other dtypes than out's are
    multiplied in their own, and the product is rounded there before it is added in out's."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    if dtype != out.dtype:
        product = a @ b if start is None else torch.addmm(start.to(dtype), a, b)
        out.add_(product) if add else out.copy_(product)
    elif add:
        torch.addmm(out, a, b, out=out)
    elif start is not None:
        torch.addmm(start.to(dtype), a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def logits_dtype(hidden: torch.dtype, weight: torch.dtype) -> torch.dtype:
    """What the product of hidden states and a weight comes in."""
    return torch.promote_types(hidden, weight)
