"""What ranks that share a vocabulary send, from the library's own fields, block and chunks; and what others send."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastloss.linear import heads
from fastloss.linear.chunks import equal_parts
from fastloss.parallel import merge, shard
from fastloss.parallel.rows import Asked, _compute
from fastloss.spec import Objective, Rows, Spec

DEFAULT_CHUNK = heads.MAX_CHUNK_BYTES
_FLOAT = 4


class Message(NamedTuple):
    """A collective, and the bytes that a rank puts in: op is gather, or max or sum for an all-reduce."""

    op: str
    bytes: int


Way = Callable[[int, int], list[Message]]  # of N rows, over tp ranks

# ---- ours -----------------------------------------------------------------------------------------------------------


def _example(objective: Objective, N: int = 2, weighted: bool = False) -> Rows:
    """Rows of a loss over four classes."""
    x = torch.zeros(N, 4)
    target = x if objective.paired else torch.zeros(N, dtype=torch.int64)
    weight, probs = torch.ones(4) if weighted else None, None
    if objective in (Objective.TOPK, Objective.TOPK_TAIL):
        target, probs = torch.zeros(N, 1, dtype=torch.int64), torch.ones(N, 1)
    return Rows(x, target, weight, Spec(objective=objective), probs)


def contributed(rows: Rows, asked: Asked) -> merge.Fields:
    """What a rank that has the first half of the classes says of them."""
    part = merge.Part(0, 2, 4)
    cut = rows._replace(input=rows.input[:, :2].contiguous(), weight=None if rows.weight is None else rows.weight[:2])
    if not rows.spec.objective.indexed:
        cut = cut._replace(target=rows.target[:, :2].contiguous())
    return merge.contribution(cut, merge.rows_of(cut, part), part, _compute, *asked)


def fields() -> dict[str, list[int]]:
    """Float32 numbers of a row in each collective of the forward."""
    plain, index = Asked(), Objective.INDEX

    def count(objective: Objective, asked: Asked = plain, weighted: bool = False) -> int:
        return len(contributed(_example(objective, weighted=weighted), asked))

    return {
        "cross-entropy": [count(index)],
        "with class weights": [count(index, weighted=True)],
        "with statistics": [count(index, Asked(True, True))],
        "KL": [count(Objective.FORWARD_KL)],
        "JS": [count(Objective.JS), 2],
        "top-k": [count(Objective.TOPK)],
        "top-k, lumped tail": [count(Objective.TOPK_TAIL)],
    }


CROSS_ENTROPY = len(contributed(_example(Objective.INDEX), Asked()))


def sent(N: int, count: int = CROSS_ENTROPY) -> list[int]:
    """Bytes that a rank puts into each of the all-gathers for N rows of `count` fields: a block, and what is left."""
    left = N * count * _FLOAT - (shard.BLOCK_BYTES - shard.HEADER_BYTES)
    return [shard.BLOCK_BYTES] + [left] * (left > 0)


def ours(N: int, tp: int) -> list[Message]:
    """All fields of all ranks, to all ranks."""
    return [Message("gather", count) for count in sent(N)]


def compiled(N: int, tp: int) -> list[Message]:
    """Under torch.compile: neither a header nor a block, and so never a second collective."""
    return [Message("gather", N * CROSS_ENTROPY * _FLOAT)]


# ---- others', and what ours could be --------------------------------------------------------------------------------


def three(N: int, tp: int) -> list[Message]:
    """Maximum, target's logit, sum of exponentials: Megatron, torch's loss_parallel, torchtitan, Liger."""
    return [Message("max", _FLOAT * N)] + [Message("sum", _FLOAT * N)] * 2


def two(N: int, tp: int) -> list[Message]:
    """The same with the two sums as one: Megatron's fused loss."""
    return [Message("max", _FLOAT * N), Message("sum", 2 * _FLOAT * N)]


def max_and_sums(N: int, tp: int) -> list[Message]:
    """Ours as reductions: the largest centre, then all other fields relative to it."""
    return [Message("max", _FLOAT * N), Message("sum", (CROSS_ENTROPY - 1) * _FLOAT * N)]


def flash(N: int, tp: int) -> list[Message]:
    """Log-partitions gathered, losses summed: flash-attn, fla."""
    return [Message("gather", _FLOAT * N), Message("sum", _FLOAT * N)]


WAYS: dict[str, Way] = {
    "ours": ours,
    "ours, compiled": compiled,
    "three all-reduces": three,
    "max, two sums": two,
    "max, our sums": max_and_sums,
    "gather lse, sum": flash,
}


def logits_ways(N: int, V: int, tp: int) -> list[Message]:
    """The logits themselves, in 16 bits."""
    return [Message("gather", 2 * N * (V // tp))]


def received(messages: list[Message], tp: int) -> float:
    """Bytes that reach a rank, of a ring: (tp - 1) blocks; an all-reduce's parts twice."""
    return sum(m.bytes * (tp - 1) * (1 if m.op == "gather" else 2 / tp) for m in messages)


# ---- chunks and memory ----------------------------------------------------------------------------------------------


def chunk_rows(N: int, H: int, V: int, tp: int) -> int:
    """Rows of a chunk of a loss of hidden states, of which the last hides the sum of their gradient."""
    hidden, weight = (torch.empty(n, H, dtype=torch.bfloat16, device="meta").requires_grad_() for n in (N, V // tp))
    return equal_parts(N, heads.room(heads.Head(hidden, weight, None), DEFAULT_CHUNK)[0])


def kept(N: int = 1024) -> float:
    """Bytes of a row that a cross-entropy of one rank's classes keeps for the backward, beside the logits."""
    rows = _example(Objective.INDEX, N)
    local = merge.rows_of(rows, merge.Part(0, 4, 4))
    stats = 5 * _FLOAT * N
    tensors = rows.target, local.target, local.probs
    return (stats + sum(t.nbytes for t in tensors if t is not None)) / N


class Peak(TorchDispatchMode):
    """Bytes of tensors that are made within, and the most that exist at once; not of memory of `known` tensors."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.users: Counter[int] = Counter({t.untyped_storage().data_ptr(): 1 for t in known})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes():
                self._made(t)
        return out

    def _made(self, t: torch.Tensor) -> None:
        where, count = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
        self.now += 0 if self.users[where] else count
        self.most = max(self.most, self.now)
        self.users[where] += 1
        finalize(t, self._gone, where, count)

    def _gone(self, where: int, count: int) -> None:
        self.users[where] -= 1
        self.now -= 0 if self.users[where] else count


def merge_peak(tp: int, N: int = 1024) -> float:
    """Bytes of a row that exist at once while the fields of tp ranks become a loss, beside those fields."""
    rows = _example(Objective.INDEX, N)
    parts = {name: field.expand(tp, N).contiguous() for name, field in contributed(rows, Asked()).items()}
    with Peak([*parts.values(), rows.target]) as peak:
        merge.merged(rows, parts)
    return peak.most / N
