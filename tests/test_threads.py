"""Threads, processes and determinism of the native backend."""

from __future__ import annotations

import os
import select
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from check import value_and_grad

import fastloss


@pytest.fixture
def batch(generator):
    x = torch.randn(300, 5003, generator=generator)
    return x, torch.randint(5003, (300,), generator=generator)


@pytest.fixture
def threads():
    """Sets torch's thread count; restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_same_bits_whatever_the_thread_count(isa, batch, threads):
    results = []
    for count in 1, 2, 3, 7:
        threads(count)
        results.append(value_and_grad(fastloss.cross_entropy, batch[0], None, batch[1], label_smoothing=0.1))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_whatever_the_batch(isa, batch, dtype):
    """A row's loss and gradient do not depend on its neighbours, its position or its alignment."""
    x, y = batch[0].to(dtype), batch[1]
    loss, grad = value_and_grad(fastloss.cross_entropy, x, None, y, reduction="none")
    reduced = value_and_grad(fastloss.cross_entropy, x, None, y, reduction="sum")[1]
    for i in 0, 1, 17, 299:
        alone = value_and_grad(fastloss.cross_entropy, x[i : i + 1], None, y[i : i + 1], reduction="none")
        summed = value_and_grad(fastloss.cross_entropy, x[i : i + 1], None, y[i : i + 1], reduction="sum")[1]
        assert torch.equal(alone[0][0], loss[i])
        assert torch.equal(alone[1][0], grad[i])
        assert torch.equal(summed[0], reduced[i])


def test_concurrent_calls(batch):
    """Several Python threads at once, each with its own upstream gradient."""
    x, y = batch

    def call(i: int):
        return value_and_grad(fastloss.cross_entropy, x * (1 + i % 4), torch.tensor(1.0 + i % 3), y)

    expected = [call(i) for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            for got, want in zip(pool.map(call, range(12)), expected, strict=True):
                assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings(
    "ignore:.*fork.*:DeprecationWarning"
)  # that of Python 3.12 about threads, which is the point
def test_calls_after_fork(batch):
    """A forked child has torch's OpenMP pool without its threads; our calls must not wait for them."""
    x, y = batch
    want = value_and_grad(fastloss.cross_entropy, x, None, y)  # the parent's pool is up
    leaf = x.clone().requires_grad_()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with torch.autograd.set_multithreading_enabled(False):
            loss = fastloss.cross_entropy(leaf, y)
            loss.backward()
        team = fastloss.backends.native._native.team_kind()
        torch.set_num_threads(1)  # torch's own operators would wait for their lost threads
        same = torch.equal(loss, want[0]) and torch.equal(leaf.grad, want[1])
        os.write(write, f"{same} {team}".encode())
        os._exit(0)
    os.close(write)
    if not select.select([read], [], [], 60)[0]:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the child hangs")
    assert os.read(read, 100).decode() == "True threads"
    assert os.waitpid(child, 0)[1] == 0


class Losses(torch.utils.data.Dataset):
    """Each item is a loss and some of its gradient."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> torch.Tensor:
        x = torch.full((40, 3000), float(i)).requires_grad_()
        loss = fastloss.cross_entropy(x, torch.arange(40))
        loss.backward()
        return torch.cat([loss.detach()[None], x.grad[::7, ::500].flatten()])


def test_in_data_loader_workers():
    got = torch.cat(list(torch.utils.data.DataLoader(Losses(), num_workers=2, batch_size=2)))
    want = torch.stack([Losses()[i] for i in range(6)])
    assert torch.equal(got, want)


def test_the_gil_is_released(batch):
    """While one thread computes, another Python thread runs."""
    x = torch.randn(2000, 20000)
    y = torch.zeros(2000, dtype=torch.int64)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(fastloss.cross_entropy, x, y)
        ticks = 0
        while not future.done():
            ticks += 1
    assert ticks > 100
