"""Processes that are the ranks of a group: started once for all tests of a module, and told functions to run."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from fastloss.parallel import shard as sharding

_SECONDS = 60  # after which a collective that not all ranks reach is an error


class Ranks:
    """`run(function, *args)` calls it on every rank and gives the results in order; `fails` gives the exceptions."""

    def __init__(self, pipes: list[Connection]) -> None:
        self.pipes = pipes

    def tell(self, function: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        for pipe in self.pipes:
            pipe.send((function, args))
        return [pipe.recv() for pipe in self.pipes]

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        found = self.tell(function, *args)
        for rank, (worked, value) in enumerate(found):
            assert worked, f"rank {rank}: {value[1]}"
        return [value for _, value in found]

    def fails(self, function: Callable[..., Any], *args: Any) -> list[Exception]:
        found = self.tell(function, *args)
        for rank, (worked, value) in enumerate(found):
            assert not worked, f"rank {rank} did not fail: {value}"
        return [value[0] for _, value in found]


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=_SECONDS)
    )
    while (told := pipe.recv()) is not None:
        function, args = told
        try:
            pipe.send((True, function(*args)))
        except Exception as error:
            pipe.send((False, (error, traceback.format_exc())))
    dist.destroy_process_group()


@contextmanager
def gathers() -> Iterator[list[int]]:
    """Bytes that this rank puts into each all-gather of a loss."""
    seen: list[int] = []
    gather = sharding.all_gather

    def count(out: Tensor, x: Tensor, **more: Any) -> Any:
        seen.append(x.nbytes)
        return gather(out, x, **more)

    with patch.object(sharding, "all_gather", count):
        yield seen


@contextmanager
def ranks(size: int) -> Iterator[Ranks]:
    """Processes of one Gloo group."""
    context = mp.get_context("spawn")
    store = tempfile.mktemp(prefix="fastloss_store")
    pipes, workers = [], []
    for rank in range(size):
        here, there = context.Pipe()
        worker = context.Process(target=_serve, args=(rank, size, store, there), daemon=True)
        worker.start()
        there.close()
        pipes.append(here)
        workers.append(worker)
    try:
        yield Ranks(pipes)
    finally:
        for pipe in pipes:
            with suppress(BrokenPipeError):  # of a test whose rank was to die
                pipe.send(None)
        for worker in workers:
            worker.join(20)
        if os.path.exists(store):
            os.unlink(store)
