"""What callers pass, brought to rows: logits (..., V), and class indices (N,) or class probabilities (..., V).

The checks raise torch's exception types on torch's conditions, before anything is computed or written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .saved import savable
from .spec import COMPUTE_DTYPE, NUMBERS, PLAIN_TYPES, Reduction, Spec, constant
from .strides import count_rows, overlap

_INDEX_DTYPES = (torch.int64, torch.int32, torch.uint8)
# Asked at import, for torch.compile could not trace the question before torch 2.12.
_KNOWN_DEVICES = frozenset(("cpu", "cuda", "hpu", "maia", "meta", "mps", "mtia", "xla", "xpu"))
_AUTOCAST_DEVICES = frozenset(d for d in _KNOWN_DEVICES if torch.amp.is_autocast_available(d))
_LOW_PRECISION = (torch.bfloat16, torch.float16)


def as_rows(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Views of the logits as (N, V) or (..., V), and of the target as (N,) or in the logits' shape."""
    # What nearly every call is comes first: small ones must be quick.
    takes = input.dtype in COMPUTE_DTYPE and input.layout is torch.strided
    if takes and target.dtype is torch.int64 and input.dim() == 2 and target.dim() == 1:
        if input.shape[0] == target.shape[0]:
            return input, target
    elif not takes:
        raise NotImplementedError(
            f"input: expected strided logits in float32, bfloat16, float16 or float64, got {input.dtype} {input.layout}"
        )
    if equal_shapes(input.shape, target.shape):
        if not target.is_floating_point():
            raise RuntimeError(
                f"target: Expected floating point type for target with class probabilities (it has the shape of "
                f"input, {tuple(input.shape)}), got {target.dtype}"
            )
        if ignore_index >= 0:
            raise RuntimeError(f"ignore_index is not supported for floating point target, got {ignore_index}")
        return _class_rows(input), _class_rows(target)
    if input.dim() != 1:  # torch's order
        _check_index_shape(input, target)
    if target.dtype not in _INDEX_DTYPES:
        raise RuntimeError(f"target: expected target dtype to be Long, Int or Byte (class indices), got {target.dtype}")
    if input.dim() == 1:
        _check_index_shape(input, target)
    indices = target.reshape(-1)
    return _class_rows(input), indices if indices.dtype == torch.int64 else indices.long()


def equal_shapes(a: torch.Size, b: torch.Size) -> bool:
    """Whether they are, of as many dimensions first: tuples compare size by size as far as both go, and torch.export
    and torch.compile would hold that the first two sizes that differ, the classes' and the time's, always do."""
    return len(a) == len(b) and a == b


def _class_rows(x: Tensor) -> Tensor:
    if x.dim() == 2:
        return x
    if x.dim() < 2:
        return x.reshape(1, -1)
    return x.movedim(1, -1)


def _check_index_shape(input: Tensor, target: Tensor) -> None:
    shape, got = tuple(input.shape), tuple(target.shape)
    if len(shape) == 0:
        raise RuntimeError("input: expected logits of shape (C), (N, C) or (N, C, d1, ...), got a scalar")
    if len(shape) == 1:
        if len(got) > 1:
            raise RuntimeError(f"target: 0D or 1D target tensor expected, multi-target not supported; got shape {got}")
        if got not in ((), (1,)):
            raise ValueError(f"For 1D input, 1D target must have size 1, but got target size: {got[0]}")
        return
    if not got and shape[0] == 0:
        raise IndexError("target: expected one class index for each row of input, got a tensor without dimensions")
    if shape[0] != (got[0] if got else 0):
        raise ValueError(
            f"Expected input batch_size ({shape[0]}) to match target batch_size ({got[0] if got else 0}): "
            f"input has shape {shape}, target {got}"
        )
    if len(shape) == 2 and len(got) > 1:
        raise RuntimeError(f"target: 0D or 1D target tensor expected, multi-target not supported; got shape {got}")
    expected = shape[:1] + shape[2:]
    if got != expected:
        raise RuntimeError(f"Expected target size {list(expected)}, got {list(got)}")


def as_class_weights(weight: Tensor, input: Tensor, target: Tensor, classes: int, spec: Spec, reduction: str) -> Tensor:
    """Class weights as (V,): one per class, and of the logits' dtype where torch demands it; target as in as_rows."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"argument 'weight' (position 3) must be Tensor, not {type(weight).__name__}")
    soft = target.is_floating_point()
    # With class indices for logits of 3 or more dimensions torch only counts the weights.
    takes_any_shape = not soft and input.dim() > 2
    if weight.numel() != classes or (weight.dim() != 1 and not takes_any_shape):
        raise RuntimeError(
            f"weight tensor should be defined either for all {classes} classes or no classes but got weight tensor of "
            f"shape: {list(weight.shape)}"
        )
    if weight.is_complex():
        raise RuntimeError(f"weight: expected real numbers, got {weight.dtype}")
    if not soft and weight.dtype != input.dtype and not _under_autocast(input):
        raise RuntimeError(f"weight: expected scalar type of input, {input.dtype}, but found {weight.dtype}")
    if weight.dim() == 1:
        return weight
    if spec.label_smoothing:
        _check_smoothed_weight(weight, target, classes, spec, reduction)
    return weight.reshape(-1)


def _check_smoothed_weight(weight: Tensor, target: Tensor, classes: int, spec: Spec, reduction: str) -> None:
    """torch's label smoothing takes the first dimension for the classes, and its mean looks targets up in a vector."""
    if weight.size(0) != classes or (reduction == "mean" and bool((target != spec.ignore_index).any())):
        raise RuntimeError(
            f"weight: expected a tensor of shape ({classes},) with label_smoothing, got {tuple(weight.shape)}"
        )


def check_token_weight(token_weight: Tensor, logits: Tensor, shape: torch.Size) -> Tensor:
    """Weights of the rows of these logits (..., V), of targets of `shape`, as (N,) in the compute dtype. Masks and
    counts are weights too: bool and integers."""
    if not isinstance(token_weight, Tensor):
        raise TypeError(f"argument 'token_weight' must be Tensor, not {type(token_weight).__name__}")
    flat = torch.Size((count_rows(logits),))
    if not (equal_shapes(token_weight.shape, shape) or equal_shapes(token_weight.shape, flat)):
        raise ValueError(
            f"token_weight: expected shape {tuple(shape)} (one weight per target), got {tuple(token_weight.shape)}"
        )
    if token_weight.is_complex():
        raise RuntimeError(f"token_weight: expected real numbers, got {token_weight.dtype}")
    return savable(token_weight).reshape(-1).to(COMPUTE_DTYPE[logits.dtype])


def as_normalizer(normalizer: Tensor | float, like: Tensor, reduction: str) -> Tensor:
    """The caller's denominator as a 0-d tensor beside the logits; never read on the host."""
    if reduction == "none":
        raise ValueError("normalizer: expected reduction='mean' or 'sum' with it, got reduction='none'")
    dtype = COMPUTE_DTYPE[like.dtype]
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer: expected a number or a tensor of one element, got {tuple(normalizer.shape)}")
        if normalizer.is_complex() or normalizer.layout is not torch.strided:
            raise RuntimeError(f"normalizer: expected a real number, got {normalizer.dtype} {normalizer.layout}")
        return savable(normalizer).reshape(()).to(device=like.device, dtype=dtype, non_blocking=True)
    if not isinstance(normalizer, NUMBERS):
        raise TypeError(f"normalizer: expected a number or a Tensor, got {type(normalizer).__name__}")
    if torch.compiler.is_compiling():  # not full: a compiler would make a graph for every float
        return torch.ones((), dtype=dtype, device=like.device) * normalizer
    # NumPy's numbers are no scalars to torch in every dtype: float16, and unsigned integers.
    number = normalizer if isinstance(normalizer, (int, float)) else float(normalizer)
    return torch.full((), number, dtype=dtype, device=like.device)


def classes_last(input: Tensor, name: str = "input") -> Tensor:
    """Logits (..., V), checked, with at least one dimension before the classes."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(input).__name__}")
    if input.dtype not in COMPUTE_DTYPE or input.layout is not torch.strided:
        raise NotImplementedError(
            f"{name}: expected strided logits in float32, bfloat16, float16 or float64, "
            f"got {input.dtype} {input.layout}"
        )
    if input.dim() == 0:
        raise RuntimeError(f"{name}: expected logits of shape (..., V), got a scalar")
    return input[None] if input.dim() == 1 else input


def check_filter_eps(filter_eps: float | None) -> float | None:
    """Below what a gradient of logits may be left out."""
    if filter_eps is None:
        return None
    if not isinstance(filter_eps, (int, float)) or not 0 <= filter_eps < float("inf"):
        raise ValueError(f"filter_eps: expected a finite number >= 0 or None, got {filter_eps!r}")
    return float(constant(filter_eps) if torch.compiler.is_compiling() else filter_eps)


def check_linear(input: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "", positions: bool = False) -> None:
    """Hidden states (..., H) and a last layer (V, H), (V); with `positions` also (V, d1, ..., dK, H). `prefix` stands
    before the arguments' names."""
    for name, value in (("input", input), ("linear_weight", weight), ("linear_bias", bias)):
        if value is None and name == "linear_bias":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"argument '{prefix}{name}' must be Tensor, not {type(value).__name__}")
        if value.dtype not in COMPUTE_DTYPE or value.layout is not torch.strided:
            raise NotImplementedError(
                f"{prefix}{name}: expected a strided tensor in float32, bfloat16, float16 or float64, got "
                f"{value.dtype} {value.layout}"
            )
        if type(value) in PLAIN_TYPES and not torch.compiler.is_compiling() and _is_freed(value):
            raise RuntimeError(
                f"{prefix}{name}: expected its numbers, got a tensor whose memory was freed, as FSDP frees a weight "
                "that it has sharded again: compute the loss in the forward of the module that it belongs to, or after "
                "module.unshard(), or with module.set_reshard_after_forward(False)"
            )
        if value.dtype != input.dtype and not (_under_autocast(input) and value.dtype != torch.float64):
            raise RuntimeError(f"{prefix}{name}: expected input's dtype, {input.dtype}, got {value.dtype}")
    if input.dim() < 1:
        raise RuntimeError(f"{prefix}input: expected input with dimensionality 1 or more, got {input.dim()}")
    if weight.dim() < 2 or (weight.dim() > 2 and not positions):
        more = "at least 2" if positions else "2"
        raise RuntimeError(
            f"{prefix}linear_weight: expected linear_weight with dimensionality {more}, got {weight.dim()}"
        )
    if input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            f"{prefix}linear_weight: expected equal input and linear_weight last dimensions (in_features), got "
            f"{input.shape[-1]} and {weight.shape[-1]}, respectively"
        )
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise RuntimeError(
            f"{prefix}linear_bias: expected linear_bias shape {tuple(weight.shape[:-1])}, got {tuple(bias.shape)}"
        )
    if weight.dim() > 2 and input.dim() != 2:
        raise RuntimeError(
            f"{prefix}input: K-dimensional loss defined by linear_weight shape {tuple(weight.shape)} requires batched "
            f"input, (N, {input.shape[-1]}), got "
            f"{'unbatched ' if input.dim() == 1 else ''}input with shape {tuple(input.shape)}"
        )


def _is_freed(value: Tensor) -> bool:
    try:
        return value.numel() > 0 and value.device.type != "meta" and value.untyped_storage().size() == 0
    except NotImplementedError:  # of torch.func, which has no storage to ask
        return False


def refuse(function: str, options: dict[str, Any], *names: str) -> None:
    """Of options that are passed on, those that would change what the function makes of the loss."""
    for name in names:
        value = options.pop(name, None)
        if value is not None and (value or name != "return_stats"):
            raise TypeError(f"{function}() does not take {name}")


def check_indices(y: Tensor, ignore_index: int, V: int) -> None:
    """Before anything is computed or sent. On devices the kernels look, and nothing is waited for."""
    if y.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(y, FakeTensor):
        return
    bad = (y != ignore_index) & ((y < 0) | (y >= V))
    if bool(bad.any()):
        raise IndexError(
            f"target: expected class indices in [0, {V}) or ignore_index ({ignore_index}), but Target "
            f"{y[bad][0].item()} is out of bounds."
        )


def beside(tensor: Tensor, name: str, input: Tensor, shape: torch.Size, integral: bool = False) -> Tensor:
    """A tensor that must have this shape and stand on input's device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in _INDEX_DTYPES if integral else not tensor.is_floating_point():
        kind = "class indices in int64, int32 or uint8" if integral else "floating point numbers"
        raise RuntimeError(f"{name}: expected {kind}, got {tensor.dtype}")
    return tensor.long() if integral else tensor


def as_row_mask(mask: Tensor | None, name: str, shape: torch.Size) -> Tensor | None:
    """Which rows count, as (N,)."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a bool Tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"{name}: expected a bool Tensor of shape {tuple(shape)}, True where a row counts, got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    return savable(mask).reshape(-1)


def leave_out(
    mask: Tensor, shape: torch.Size, logits: Tensor, target: Tensor, token_weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """Target and token weights of rows of logits (..., V): of a row that the mask leaves out, an ignored class index,
    or with class probabilities a weight of zero."""
    counts = as_row_mask(mask, "mask", shape)
    assert counts is not None
    if target.is_floating_point():
        return target, _masked_weights(counts, token_weight, COMPUTE_DTYPE[logits.dtype])
    return torch.where(counts, target, ignore_index), token_weight


def _masked_weights(counts: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    return counts.to(dtype) if weights is None else torch.where(counts, weights, 0)


def as_reduction(
    input: Tensor,
    reduction: str,
    token_weight: Tensor | None,
    mask: Tensor | None,
    normalizer: Tensor | float | None,
    out_dtype: torch.dtype | None,
    kinds: tuple[str, ...] = ("none", "mean", "sum"),
) -> Reduction:
    """How losses of logits (..., V) become what the caller asked for; rows that the mask leaves out weigh nothing."""
    if reduction not in kinds:
        raise ValueError(f"reduction: expected one of {', '.join(kinds)}, got {reduction!r}")
    shape, dtype = input.shape[:-1], COMPUTE_DTYPE[input.dtype]
    weights = None if token_weight is None else check_token_weight(token_weight, input, shape)
    counts = as_row_mask(mask, "mask", shape)
    if counts is not None:
        weights = _masked_weights(counts, weights, dtype)
    if reduction == "batchmean":
        if normalizer is not None:
            raise ValueError("normalizer: expected reduction='mean' or 'sum' with it, got reduction='batchmean'")
        reduction, normalizer = "sum", input.shape[0] if input.dim() > 1 else 1
    divisor = None if normalizer is None else as_normalizer(normalizer, input, reduction)
    return Reduction(reduction, weights, divisor, result_dtype(input, out_dtype))


def check_inplace(input: Tensor, rows: Tensor) -> None:
    """The gradient can only overwrite logits that are dense rows of a tensor autograd may see changed."""
    leaf = any(t is not None and t.is_leaf and t.requires_grad for t in (input, input._base))
    if leaf and torch.is_grad_enabled():
        raise RuntimeError(
            "inplace=True: input is a leaf Variable that requires grad, or a view of one, and cannot be overwritten"
        )
    if overlap(rows):
        raise ValueError(
            f"inplace=True: expected logits whose classes are contiguous and whose rows do not overlap, at one or two "
            f"strides, got shape {tuple(input.shape)} with strides {input.stride()}"
        )


def loss_dtype(input: Tensor, target: Tensor, weight: Tensor | None, out_dtype: torch.dtype | None) -> torch.dtype:
    """torch's result dtype: that of the input, float32 under autocast, promoted by class probabilities."""
    if out_dtype is None and input.dtype is torch.float32 and target.dtype is torch.int64:
        return torch.float32
    dtype = result_dtype(input, out_dtype)
    if out_dtype is None and target.is_floating_point():
        for other in (target, weight):
            if other is not None and not (_under_autocast(input) and other.dtype in _LOW_PRECISION):
                dtype = torch.promote_types(dtype, other.dtype)
    return dtype


def result_dtype(input: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """`out_dtype`, by default the input's, but float32 under autocast."""
    if out_dtype is None:
        return torch.float32 if _under_autocast(input) else input.dtype
    if not out_dtype.is_floating_point:
        raise TypeError(f"out_dtype: expected a floating point dtype, got {out_dtype}")
    return out_dtype


def _under_autocast(input: Tensor) -> bool:
    device = input.device.type
    if input.dtype == torch.float64:
        return False
    # A device that somebody's own backend brings is not known at import.
    exists = device in _AUTOCAST_DEVICES or (device not in _KNOWN_DEVICES and torch.amp.is_autocast_available(device))
    return exists and torch.is_autocast_enabled(device)
