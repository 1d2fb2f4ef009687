"""A vocabulary that two ranks share, each a process of one thread: beside torch's `loss_parallel()` and the scheme of
three all-reduces that Megatron-LM has."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.parallel.shard import BLOCK_BYTES, all_gather

RANKS = 2
SHAPES = ((2048, 32000), (32, 103))


class ThreeReductions(torch.autograd.Function):
    """(logits (N, V / ranks) of this rank, target, first class) -> losses (N,): the maximum, the target's logit and the
    sum of exponentials are reduced over ranks, and the softmax is kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, first: int) -> Tensor:
        top = logits.amax(-1)
        dist.all_reduce(top, dist.ReduceOp.MAX)
        shifted = logits - top[:, None]
        elsewhere = (target < first) | (target >= first + logits.shape[1])
        here = (target - first).masked_fill(elsewhere, 0)
        chosen = shifted.gather(1, here[:, None])[:, 0].masked_fill(elsewhere, 0)
        dist.all_reduce(chosen)
        p = shifted.exp_()
        total = p.sum(-1)
        dist.all_reduce(total)
        ctx.save_for_backward(p.div_(total[:, None]), elsewhere, here)
        return total.log() - chosen

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        p, elsewhere, here = ctx.saved_tensors
        p[torch.arange(len(here), device=here.device), here] -= (~elsewhere).to(p.dtype)
        return p.mul_(upstream[:, None]), None, None


def _alternatives(N: int, V: int) -> dict[str, Callable[[], None]]:
    """Forward and backward of a mean over the same logits."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    shard, g = fastloss.VocabShard.even(V), torch.Generator().manual_seed(0)
    logits, target = torch.randn(N, V, generator=g, device="cpu"), torch.randint(V, (N,), generator=g, device="cpu")
    x = logits[:, shard.start : shard.stop].clone().requires_grad_()
    mesh = init_device_mesh("cpu", (RANKS,))
    own = x.detach().clone()
    whole = DTensor.from_local(own, mesh, [Shard(1)], run_check=False, shape=logits.shape, stride=(V, 1))
    whole.requires_grad_()
    block = torch.zeros(BLOCK_BYTES, dtype=torch.uint8, device="cpu")
    everyone = block.new_empty(RANKS * BLOCK_BYTES)

    def backward(loss: Tensor, of: Tensor) -> None:
        loss.backward()
        of.grad = None

    def parallel() -> None:
        with loss_parallel():
            backward(F.cross_entropy(whole, target), whole)

    return {
        "fastloss": lambda: backward(fastloss.cross_entropy(x, target, shard=shard), x),
        "fastloss DTensor": lambda: backward(fastloss.cross_entropy(whole, target), whole),
        "loss_parallel": parallel,
        "three all-reduces": lambda: backward(ThreeReductions.apply(x, target, shard.start).mean(), x),
        "one collective alone": lambda: all_gather(everyone, block),
    }


def _measure(rank: int, store: str, rounds: int, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    for N, V in SHAPES:
        calls = _alternatives(N, V)
        many = rounds if N * V > 1 << 20 else 20 * rounds
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(many + 2):
            for name, call in calls.items():
                dist.barrier()
                start = time.perf_counter()
                call()
                if turn >= 2:
                    seconds[name].append(time.perf_counter() - start)
        if rank == 0:
            answers.put((N, V, {name: statistics.median(times) * 1e3 for name, times in seconds.items()}))
    dist.barrier()  # who leaves first must not be waited for
    leave()


def leave(status: int = 0) -> NoReturn:
    """Ends this process at once. DTensor's caches keep a process group beyond ``destroy_process_group``. If a thread of
    Gloo then frees the last collective's tensor while Python shuts down, the process is aborted."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def shared_vocabulary(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of forward and backward, float32, the median over rounds in which every way has its turn."""
    context = mp.get_context("spawn")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_measure, (str(Path(folder) / "store"), rounds, answers), RANKS)
    rows = []
    for _ in SHAPES:
        N, V, times = answers.get()
        row: dict[str, Any] = {"case": f"{N}x{V}", **{f"{name}_ms": t for name, t in times.items()}}
        for other in ("loss_parallel", "three all-reduces"):
            row[f"x {other}"] = times[other] / times["fastloss"]
        rows.append(row)
    return rows
