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

from fastloss.backends import native
from fastloss.bench.ranks import leave
from fastloss.parallel import shard as sharding

_SECONDS = 600  # after which a collective that not all ranks reach is an error: more than a busy machine ever needs

GROUPS: dict[str, Any] = {}  # of a process without a default group, by how they were made


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


def _serve(rank: int, size: int, store: str, default: bool, pipe: Connection) -> None:
    torch.set_num_threads(1)
    native._seconds = lambda *_: 1.0  # as conftest.py: what is measured must not decide
    made, timeout = dist.FileStore(store, size), timedelta(seconds=_SECONDS)
    if default:
        dist.init_process_group("gloo", store=made, rank=rank, world_size=size, timeout=timeout)
    else:
        GROUPS.update(_groups(made, rank, size, timeout))
    while (told := pipe.recv()) is not None:
        function, args = told
        try:
            pipe.send((True, function(*args)))
        except Exception as error:
            pipe.send((False, (error, traceback.format_exc())))
    leave()


def _groups(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dict[str, Any]:
    """As libraries make them that hand groups around and never call init_process_group."""
    bare, within = (dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, size, timeout) for name in "ab")
    unnamed = dist.ProcessGroup(dist.PrefixStore("c", store), rank, size)
    unnamed._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, within)
    return {"bare backend": bare, "unnamed group": unnamed}


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
def ranks(size: int, default: bool = True) -> Iterator[Ranks]:
    """Processes of one Gloo group, the default one; or of GROUPS, with no default one."""
    context = mp.get_context("spawn")
    store = tempfile.mktemp(prefix="fastloss_store")
    pipes, workers = [], []
    for rank in range(size):
        here, there = context.Pipe()
        worker = context.Process(target=_serve, args=(rank, size, store, default, there), daemon=True)
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
