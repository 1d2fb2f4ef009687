"""Fixtures: every backend, and the native one on every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastloss
from fastloss.backends import native

ENGINES = [f"cpu:{isa}" for isa in native._native.available_isas()] + ["reference"]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend, and for the native one an instruction set, forced for the test."""
    name, _, isa = request.param.partition(":")
    before = native._native.current_isa()
    if isa:
        native._native.use_isa(isa)
    with fastloss.use_backend(name):
        yield request.param
    native._native.use_isa(before)


@pytest.fixture(params=[e.partition(":")[2] for e in ENGINES if ":" in e])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set of the native backend, forced for the test."""
    before = native._native.current_isa()
    native._native.use_isa(request.param)
    yield request.param
    native._native.use_isa(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)
