"""The messages of scaling_messages.py, sent: over Gloo, between two processes of this machine. A check of their number
and size, and of what a collective costs beside its bytes; it says nothing about NVLink."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scaling_messages import WAYS, Message, logits_ways

from fastloss.parallel.shard import all_gather

RANKS = 2
_LONG, _MOST = 1 << 20, 128 << 20  # bytes that a rank sends


def _prepared(message: Message) -> Callable[[], Any]:
    """One collective, with its memory."""
    if message.op == "gather":
        mine = torch.zeros(message.bytes, dtype=torch.uint8)
        everyone = mine.new_zeros(RANKS * message.bytes)
        return lambda: all_gather(everyone, mine)
    op, values = dist.ReduceOp.MAX if message.op == "max" else dist.ReduceOp.SUM, torch.zeros(message.bytes // 4)
    return lambda: dist.all_reduce(values, op)


def _timed(message: Message) -> float:
    collective = _prepared(message)
    dist.barrier()
    start = perf_counter()
    collective()
    return 1e3 * (perf_counter() - start)


def _rank(rank: int, store: str, work: list[list[Message]], rounds: int, out: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    times: list[list[list[float]]] = [[[] for _ in messages] for messages in work]
    for message in chain(*work):
        _timed(message)
    # The ways take turns, so that what else the machine does meets them alike; logits come after all that is short.
    both = list(zip(work, times, strict=True))
    for turn in (True, False):
        those = [pair for pair in both if (sum(m.bytes for m in pair[0]) < _LONG) == turn]
        for _ in range(rounds):
            for messages, found in those:
                for message, seen in zip(messages, found, strict=True):
                    seen.append(_timed(message))
    if rank == 0:
        out.put([[median(seen) for seen in found] for found in times])
    dist.barrier()
    dist.destroy_process_group()


def measured(rows: Sequence[int], V: int, rounds: int) -> list[list[str]]:
    """Lines of a table: for each N and way, bytes that a rank sends, and milliseconds."""
    names = [(n, name) for n in rows for name in WAYS]
    work = [WAYS[name](n, RANKS) for n, name in names]
    for n in rows:
        messages = logits_ways(n, V, RANKS)
        if messages[0].bytes <= _MOST:
            names.append((n, f"logits of V = {V}"))
            work.append(messages)
    context = mp.get_context("spawn")
    out = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (str(Path(folder) / "store"), work, rounds, out), nprocs=RANKS)
    table = []
    for (n, name), messages, times in zip(names, work, out.get(), strict=True):
        parts = " + ".join(f"{t:.2f}" for t in times)
        table.append([str(n), name, " + ".join(str(m.bytes) for m in messages), parts, f"{sum(times):.2f}"])
    return table
