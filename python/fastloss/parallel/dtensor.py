"""DTensors: one mesh dimension may shard the classes, and is then the vocabulary's group; others may shard the rows."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .shard import VocabShard

_HEADS = ("linear_weight", "linear_bias", "target_linear_weight", "target_linear_bias")


def on_shards(function: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
    """A loss of arguments of which some are DTensors."""
    from torch.distributed.tensor import DTensor, Shard

    given = arguments_by_name(bound)
    source = "linear_weight" if "linear_weight" in given else "input"
    classes, input = given[source], given["input"]
    if not isinstance(classes, DTensor) or not isinstance(input, DTensor):
        _refuse_plain(given, source)
    dims, mesh = _class_dims(function.__name__, given), classes.device_mesh
    axes = [a for a, p in enumerate(classes.placements) if isinstance(p, Shard) and p.dim == dims[source]]
    if len(axes) > 1:
        raise NotImplementedError(f"{source}: expected classes sharded over one mesh dimension, got {classes._spec}")
    shard = VocabShard.even(classes.shape[dims[source]], mesh.get_group(axes[0])) if axes else None
    if axes and given.get("shard") is not None:
        raise ValueError("shard: expected None with DTensors whose placements shard the classes")
    rows = [None if a in axes or not isinstance(p, Shard) else p.dim for a, p in enumerate(input.placements)]
    if "reduction" in bound.signature.parameters or "options" in bound.signature.parameters:
        _check_reduction(given, rows)
    scattered = [a for a in axes if source != "input" and isinstance(input.placements[a], Shard)]
    if shard is not None and scattered:  # the ranks of the vocabulary share the rows too: sequence parallelism
        shard = replace(shard, sum_hidden=False)
    grads = {name: [a for a, d in enumerate(rows) if d is not None] for name in _HEADS} | {"input": scattered}
    local: dict[str, Any] = {
        name: _local(value, dims.get(name), axes, shard, grads.get(name, []))
        for name, value in given.items()
        if isinstance(value, Tensor)
    }
    if shard is not None:
        local["shard"] = shard
    second = source == "input" and dims["input"] == 1
    result = function(**{**given, **local})
    at = [None if d is None else d - (d > 1 and second) for d in rows]
    return _wrapped(result, mesh, at, {a: input.shape[d] for a, d in zip(at, rows, strict=True) if d is not None})


_HEAD_ALONE = """linear_weight: got a DTensor beside a plain input. Of an LM head that tensor parallelism shards, \
make the hidden states a DTensor too (replicated), or pass shard=VocabShard.even(V, group) with \
linear_weight.to_local(). One that FSDP has sharded must be complete: compute the loss in the forward of the module \
that it belongs to, or after module.unshard(), or with module.set_reshard_after_forward(False). \
linear_weight.full_tensor() without grad_placements would lose the gradients of the other ranks' rows, here as with \
torch's own loss"""


def _refuse_plain(given: dict[str, Any], source: str) -> None:
    """What holds the classes, or the rows, is a plain tensor, and another argument a DTensor."""
    from torch.distributed.tensor import DTensor

    distributed = [name for name, value in given.items() if isinstance(value, DTensor)]
    if source in distributed:
        raise RuntimeError(_HEAD_ALONE)
    plain = source if "input" in distributed else "input"
    raise RuntimeError(
        f"{distributed[0]}: got a DTensor beside a plain {plain}: make {plain} a DTensor of the same mesh (replicated, "
        f"where every rank has all of it), or pass {distributed[0]}.full_tensor()"
    )


def arguments_by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """All arguments by name, also the options that a loss passes on."""
    given = dict(bound.arguments)
    for p in bound.signature.parameters.values():
        if p.kind is p.VAR_KEYWORD:
            given |= given.pop(p.name, {})
    return given


def _class_dims(name: str, given: dict[str, Any]) -> dict[str, int]:
    """Which dimension of which argument is that of the classes."""
    input, target = given["input"], given.get("target")
    soft = isinstance(target, Tensor) and target.is_floating_point()
    if "linear_weight" in given:
        return {**dict.fromkeys((*_HEADS, "weight"), 0), **({"target": input.dim() - 1} if soft else {})}
    at = min(1, input.dim() - 1) if name == "cross_entropy" else input.dim() - 1
    return {"input": at, "target_logits": at, "weight": 0, **({"target": at} if soft else {})}


def _check_reduction(given: dict[str, Any], rows: list[int | None]) -> None:
    mean = given.get("reduction", "mean") in ("mean", "batchmean") and given.get("normalizer") is None
    if mean and any(d is not None for d in rows):
        raise NotImplementedError(
            "reduction: expected 'sum' or 'none', or a normalizer, of rows that are sharded over a mesh dimension, got "
            "'mean'"
        )


def _local(value: Tensor, dim: int | None, axes: list[int], shard: VocabShard | None, partial: list[int]) -> Tensor:
    """What this rank has of a tensor: of its class dimension, if it has one, the shard's part; over the vocabulary's
    mesh dimension all of the rest. The gradient is `partial`, and to be summed, over these mesh dimensions: a head's
    over those that shard the rows."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if not isinstance(value, DTensor):
        if shard is None or dim is None or value.shape[dim] != shard.vocab_size:
            return value
        return value.narrow(dim, shard.start, shard.part.size)
    placements = [Replicate() if isinstance(p, Partial) else p for p in value.placements]
    for axis in axes:
        placements[axis] = Replicate() if dim is None else Shard(dim)
    value = value.redistribute(placements=placements) if placements != list(value.placements) else value
    grads = [Partial() if a in partial else p for a, p in enumerate(placements)]
    return value.to_local(grad_placements=grads)


def _wrapped(result: Any, mesh: Any, rows: list[int | None], sizes: dict[int | None, int]) -> Any:
    """DTensors of what a loss returns. `sizes` of the sharded dimensions are said: ranks that share rows unevenly
    would each take a multiple of its own."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if isinstance(result, tuple):
        parts = [_wrapped(t, mesh, rows, sizes) for t in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    if not isinstance(result, Tensor):
        return result
    placements: list[Any] = [Replicate() if d is None else Shard(d) if result.dim() else Partial() for d in rows]
    shape = torch.Size(sizes.get(i, size) for i, size in enumerate(result.shape))
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(result, mesh, placements, run_check=False, shape=shape, stride=stride)
