"""Which classes a rank holds, and what ranks tell each other."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..spec import Rows
from .groups import check_group, rank_and_size, resolved
from .merge import Fields, Part

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name since torch 2.13


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of a vocabulary that is split over a process group: classes [start, stop) of vocab_size.

    With it, whatever has a class dimension is this rank's part: logits, class weights, class probabilities, a teacher's
    logits, head weights and biases. Class indices are those of the whole vocabulary. Rows, targets and options must be
    the same on all ranks of the group, and so is the result, to the bit. What a last rank's tensors hold beyond `stop`
    is padding: ignored, with a gradient of zero.

    Args:
        start, stop: 0 <= start <= stop <= vocab_size; the parts of all ranks cover the vocabulary, each class once. A
            part may be empty.
        vocab_size: V, without padding.
        group: a ``torch.distributed`` process group, or None: all ranks. A group of one rank communicates nothing. One
            that was made without ``init_process_group`` serves too, also a bare backend (``ProcessGroupGloo``); to
            ``torch.compile`` hand a shard of it that was made outside.
        sum_hidden: whether a loss of hidden states sums their gradient over the ranks. False leaves each rank what its
            classes give, for who sums it otherwise: the reduce-scatter of sequence parallelism. DTensors whose rows the
            same ranks share have that by themselves. A loss of logits has none to sum, and takes True alone.
    """

    start: int
    stop: int
    vocab_size: int
    group: dist.ProcessGroup | None = None
    sum_hidden: bool = True
    # The group as collectives take it, and its name: found once, because compiled code cannot. No fields, which torch
    # 2.9 hands to the constructor when it compiles.
    _group: ClassVar[Any] = None
    _name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= self.vocab_size:
            raise ValueError(
                f"VocabShard: expected 0 <= start <= stop <= vocab_size, got start={self.start}, stop={self.stop}, "
                f"vocab_size={self.vocab_size}"
            )
        if self.group is not None:
            check_group(self.group)
            group, name = resolved(self.group)
            object.__setattr__(self, "_group", group)
            object.__setattr__(self, "_name", name)

    @staticmethod
    def even(vocab_size: int, group: dist.ProcessGroup | None = None, *, padded_size: int | None = None) -> VocabShard:
        """This rank's of equal parts, as DTensor and ``torch.chunk`` cut: ceil(V / ranks) classes each, the last ranks'
        fewer. `padded_size`: of tensors padded to a multiple of the ranks (Megatron), parts of padded_size / ranks."""
        check_group(group)
        rank, size = rank_and_size(group)
        each = -(-(vocab_size if padded_size is None else padded_size) // size)
        return VocabShard(min(rank * each, vocab_size), min((rank + 1) * each, vocab_size), vocab_size, group)

    @property
    def part(self) -> Part:
        """The classes alone."""
        return Part(self.start, self.stop, self.vocab_size)

    @property
    def ranks(self) -> int:
        """How many hold the vocabulary."""
        if self.group is None and not dist.is_initialized():
            return 1
        return rank_and_size(self._group)[1]

    @property
    def group_name(self) -> Any:
        """What torch's operators find the group by."""
        name = dist.group.WORLD.group_name if self.group is None else self._name  # type: ignore[union-attr]
        if not name:
            raise RuntimeError("group: expected one with a name in compiled code: make its VocabShard outside")
        return name


def gather(fields: Fields, rows: Rows, shard: VocabShard, asked: tuple[bool, ...]) -> Fields:
    """(N,) each to (R, N), in the order of ranks: one collective, of all fields packed. Merged alike, all ranks get
    the same bits."""
    packed = torch.stack(list(fields.values()))
    if shard.ranks == 1:
        everyone = packed[None]
    elif isinstance(packed, FakeTensor):  # there are no numbers to send, and no headers to compare
        everyone = packed.new_empty(shard.ranks, *packed.shape)
    elif torch.compiler.is_compiling():
        from torch.distributed import _functional_collectives as functional

        everyone = functional.wait_tensor(functional.all_gather_tensor(packed, 0, shard.group_name))
    else:
        header = header_of(rows, shard, asked)
        everyone = _all_gather_checked(packed.view(-1).view(torch.uint8), header, shard).view(packed.dtype)
    return dict(zip(fields, everyone.view(shard.ranks, *packed.shape).unbind(1), strict=True))


# ---- agreement ------------------------------------------------------------------------------------------------------

# What ranks send is a block of this size, whatever they send: those that disagree must not wait for different numbers
# of bytes. It starts with what they must agree upon. What does not fit follows, when they are known to agree.
BLOCK_BYTES = 1 << 16
_ALIKE = ("vocab_size", "rows", "dtype", "loss", "options", "class weights")
HEADER_BYTES = 8 * (2 + len(_ALIKE))
_agreed: set[tuple[tuple[int, ...], ...]] = set()


def new_block(header: tuple[int, ...], device: torch.device) -> Tensor:
    """Bytes to be sent, of which those from HEADER_BYTES on are not written yet."""
    block = torch.empty(BLOCK_BYTES, dtype=torch.uint8, device=device)
    block[:HEADER_BYTES] = _on(header, device)
    return block


def exchange(block: Tensor, header: tuple[int, ...], shard: VocabShard) -> Tensor:
    """The blocks of all ranks, (R, BLOCK_BYTES); the same error on every rank where their headers disagree."""
    everyone = _gathered(block, shard)
    # A device is waited for only where this rank calls for the first time.
    if block.device.type == "cpu" or header not in _checked:
        _check_headers(everyone[:, :HEADER_BYTES].contiguous().view(torch.int64).tolist(), shard.vocab_size)
        _checked.add(header)
    return everyone


def _all_gather_checked(mine: Tensor, header: tuple[int, ...], shard: VocabShard) -> Tensor:
    """Bytes (B,) of all ranks, (R, B)."""
    block = new_block(header, mine.device)
    first = min(len(mine), BLOCK_BYTES - HEADER_BYTES)
    block[HEADER_BYTES : HEADER_BYTES + first] = mine[:first]
    everyone = exchange(block, header, shard)[:, HEADER_BYTES : HEADER_BYTES + first]
    if first < len(mine):
        everyone = torch.cat([everyone, _gathered(mine[first:], shard)], 1)
    return everyone.contiguous()


_checked: set[tuple[int, ...]] = set()


def _gathered(mine: Tensor, shard: VocabShard) -> Tensor:
    everyone = mine.new_empty(shard.ranks * len(mine))
    all_gather(everyone, mine, group=shard._group)
    return everyone.view(shard.ranks, len(mine))


@lru_cache(maxsize=256)
def _on(header: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(header, dtype=torch.int64, device=device).view(torch.uint8)


def header_of(rows: Rows, shard: VocabShard, asked: tuple[bool, ...]) -> tuple[int, ...]:
    """The part, and numbers for all that must be alike."""
    picks = 0 if rows.probs is None else rows.probs.shape[1]
    said = str(rows.compute_dtype), rows.spec.objective.name, rows.spec, asked, picks, rows.weight is not None
    return shard.start, shard.stop, shard.vocab_size, rows.N, *_numbers(*said)


@lru_cache(maxsize=256)
def _numbers(dtype: str, loss: str, *options: Any) -> tuple[int, ...]:
    *rest, weights = options
    return *(zlib.crc32(str(value).encode()) for value in (dtype, loss, rest)), int(weights)


def _check_headers(table: list[list[int]], vocab_size: int) -> None:
    key = tuple(tuple(row) for row in table)
    if key in _agreed:
        return
    for k, name in enumerate(_ALIKE, 2):
        values = [row[k] for row in table]
        if len(set(values)) > 1:
            shown = values if name in ("vocab_size", "rows") else _named(values)
            raise RuntimeError(f"{name}: expected the same on all ranks of the vocabulary's group, got {shown}")
    _check_cover([(row[0], row[1]) for row in table], vocab_size)
    _agreed.add(key)


def _named(values: list[int]) -> str:
    """Which ranks are alike, of what a number cannot show."""
    groups: dict[int, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    return " unlike ".join(f"those of ranks {ranks}" for ranks in groups.values())


def _check_cover(parts: list[tuple[int, int]], vocab_size: int) -> None:
    at = 0
    for start, stop in sorted(part for part in parts if part[0] < part[1]):
        if start != at:
            break
        at = stop
    else:
        if at == vocab_size:
            return
    raise RuntimeError(f"shard: expected parts that cover [0, {vocab_size}) once, got [start, stop) of {parts} by rank")


def check_padding(columns: int, shard: VocabShard) -> None:
    """Logits have at least the shard's classes; more only after the vocabulary's last."""
    size = shard.part.size
    if columns < size or (columns > size and shard.stop != shard.vocab_size):
        raise ValueError(
            f"input: expected this rank's {size} classes, [{shard.start}, {shard.stop}) of {shard.vocab_size}, in the "
            f"class dimension{' or more, the rest padding' if shard.stop == shard.vocab_size else ''}, got {columns}"
        )
