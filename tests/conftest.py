"""Fixtures of more than one test module."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from unittest.mock import patch

import gpu_device
import pytest
import torch
from engines import ENGINES, ISAS, on_engine, on_gpu_backend
from on_gpu import must_run

from fastloss.backends import native
from fastloss.linear import upstream


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """The fake device's thread of autograd may free a tensor while Python shuts down, which aborts the process."""
    if gpu_device.FAKE and _STATUS in config.stash and not hasattr(config, "workerinput"):
        from fastloss.bench.ranks import leave

        leave(config.stash[_STATUS])


_STATUS = pytest.StashKey[int]()


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Samples that torch's own material draws from the global generator: the same in every run, alone or not."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _products_of_our_own() -> Iterator[None]:
    """Which matmul is faster here for 16-bit numbers is measured, and decides what tests see: none may depend on it."""
    with patch.object(native, "_seconds", lambda *_: 1.0):
        yield


@pytest.fixture(autouse=True)
def _nothing_expected() -> None:
    """No loss scale of an earlier test, whose guess would be wrong, and cost products that tests count."""
    upstream._of_host.clear()
    upstream._of_device.clear()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A test marked `gpu` that launches no kernel of ours there fails: it would prove nothing of a GPU."""
    if pyfuncitem.get_closest_marker("gpu") is None or gpu_device.DEVICE is None:
        return (yield)
    with gpu_device.counting() as launches:
        result = yield
    wanted = pyfuncitem.get_closest_marker("no_launch") is None
    assert (launches.number > 0) == wanted, f"{launches.number} kernels were launched on {gpu_device.DEVICE}"
    return result


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend, forced for the test."""
    with on_engine(request.param):
        yield request.param


@pytest.fixture(params=[isa.partition(":")[2] for isa in ISAS])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set of the native backend, forced for the test."""
    before = native._native.current_isa()
    native._native.use_isa(request.param)
    yield request.param
    native._native.use_isa(before)


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend of the GPU, forced for the test."""
    must_run(request.param)
    with on_gpu_backend(request.param):
        yield request.param


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small tensors: where others use the cores, waiting for a second thread takes longer than all the rest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
