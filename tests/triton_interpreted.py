"""The tests of the losses on the triton backend in Triton's interpreter, which decides when triton is imported whether
it takes the kernels. So test_triton.py starts another Python for this file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import cases
import pytest
import test_parts
import test_triton_head_grads
import test_triton_heads
import torch
from cases import CASES, DTYPES, LOSS_CASES, SHAPES
from check import assert_as_good_as_torch, assert_case
from test_cross_entropy import (  # noqa: F401
    test_normalizer_may_be_a_tensor,
    test_out_dtype_and_autocast,
    test_stats,
    test_target_dtypes,
    test_upstream_gradients,
)
from test_losses import (  # noqa: F401
    test_a_row_without_weight_shows_nothing,
    test_a_tail_of_nearly_nothing,
    test_gradients_are_finite_at_any_logits,
    test_inplace,
    test_reduced_upstream_gradients,
)
from test_losses import test_masked_vocabulary as test_masked_vocabulary_of_both  # noqa: F401
from test_losses import test_no_rows as test_no_rows_of_other_losses  # noqa: F401
from test_numerics import (  # noqa: F401
    test_all_rows_ignored,
    test_ignored_rows_are_never_read,
    test_logits_of_both_signs,
    test_masked_vocabulary,
    test_masked_vocabulary_with_weights_and_probabilities,
    test_no_rows,
    test_one_bad_row_stays_alone,
    test_target_on_a_masked_class,
)
from test_sharded import cut
from triton_engine import in_shapes, taking_turns

import fastloss
from fastloss.backends import device
from fastloss.backends import triton as backend
from fastloss.backends.triton import capture, heads, tuning
from fastloss.backends.triton.head_kernels import head_grad, head_states, kept_product

TUNED = head_states, head_grad, kept_product
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of infinities and NaN
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # NumPy's, of Triton before 3.7
    pytest.mark.usefixtures("one_thread", "truncated_bfloat16"),
]


@pytest.fixture(params=["triton"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastloss.use_backend(request.param):
        yield request.param


@pytest.fixture
def truncated_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter does not round to bfloat16, it cuts off."""
    monkeypatch.setitem(cases.TOLERANCE, torch.bfloat16, 2 * cases.TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(engine, case, dtype, generator):
    """Every case in every dtype; shapes and reductions take turns."""
    turn = CASES.index(case) + DTYPES.index(dtype)
    for k, (N, V) in enumerate(list(SHAPES.values())[turn % 3 :: 3]):
        x, y, options = case.inputs(N, V, dtype, generator)
        reduction = ("mean", "none", "sum")[(k + turn // 3) % 3]
        if reduction == "none" and "normalizer" in options:
            reduction = "mean"
        upstream = torch.rand(N, generator=generator) if reduction == "none" else None
        assert_as_good_as_torch(
            fastloss.cross_entropy, case.oracle, x, y, {**options, "reduction": reduction}, upstream
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: case.name)
def test_other_losses(engine, case, dtype, generator):
    turn = LOSS_CASES.index(case) + DTYPES.index(dtype)
    for k, (N, V) in enumerate(list(SHAPES.values())[turn % 3 :: 3]):
        assert_case(case, N, V, dtype, ("mean", "none", "sum")[(k + turn // 3) % 3], generator)


@pytest.mark.parametrize("options", test_triton_heads.OPTIONS)
def test_heads(engine, options, generator):
    """Losses of hidden states whose logits are never written. The interpreter multiplies the bits of bfloat16 numbers
    as if they were integers: those are executed as PTX only."""
    for N, V, H in (5, 2100, 40), (3, 130, 77), (70, 33, 16):
        test_triton_heads.check(N, V, H, torch.float16, generator, **test_triton_heads.OPTIONS[options])


@pytest.mark.parametrize(("options", "reduction", "filter_eps"), [("bias", "none", None), ("smoothing", "mean", 1e-7)])
def test_head_gradients(engine, options, reduction, filter_eps, generator):
    given = {**test_triton_heads.OPTIONS[options], "filter_eps": filter_eps}
    test_triton_head_grads.check(70, 140, 21, torch.float16, generator, reduction, **given)


@pytest.mark.parametrize("case", test_parts.ALL[::3], ids=lambda case: case.name)
def test_vocabularies_in_parts(engine, case, generator):
    """Two and three of them, wherever they are cut, of logits and of hidden states."""
    turn = test_parts.ALL.index(case)
    for ranks, check in (2, test_parts.check_heads), (3, test_parts.check_exactly):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[(turn + ranks) % 3]
        check(case, 3, cut(131, ranks, generator), dtype, generator)


@pytest.mark.parametrize("turn", range(1, 4))
def test_heads_in_every_shape(engine, turn, generator):
    """Of which each kernel has at most four."""
    assert all(len(kernel.configs) <= 4 for kernel in TUNED)
    with in_shapes(taking_turns(turn)):
        for options in "bias", "softcap":
            given = test_triton_heads.OPTIONS[options]
            test_triton_heads.check(67, 300, 40, torch.float16, generator, **given)
            test_triton_head_grads.check(67, 140, 70, torch.float16, generator, "mean", filter_eps=1e-7, **given)


@pytest.fixture
def timed(engine, monkeypatch) -> list[int]:
    """Where shapes are timed, by a clock that says the last is the fastest. The list gets how often it was asked."""
    asked: list[int] = []

    def bench(run: Callable[[], None], quantiles: Any) -> list[float]:
        run()
        run()
        asked.append(len(asked))
        return [1.0 / len(asked)] * 3

    monkeypatch.setattr(tuning, "benchmark", bench)
    monkeypatch.setattr(tuning, "is_timed", lambda device: True)
    monkeypatch.setattr(heads, "SLICE", 256)  # takes an eighth of the time
    for kernel in TUNED:
        monkeypatch.setattr(kernel, "tuners", {})
    return asked


def times(kernel: Any) -> int:
    return len(kernel.configs)


def chosen(kernel: Any) -> Any:
    return kernel.tuners[torch.device("cpu")].best_config


def test_timing_leaves_results_alone(timed, generator):
    """Losses and gradients of the very calls that time the kernels; three chunks, whose products add up."""
    options = {**test_triton_heads.OPTIONS["bias"], "filter_eps": 1e-7, "max_chunk_bytes": 131 * 4 * 8}
    test_triton_head_grads.check(20, 131, 40, torch.float16, generator, "mean", **options)
    assert len(timed) == times(head_states) + times(head_grad) + 2 * times(kept_product)
    assert [chosen(kernel) for kernel in TUNED] == [kernel.configs[-1] for kernel in TUNED]


def test_what_is_added_to_is_not_added_to_again(timed, generator):
    """By a first product that adds; after it, whether others do makes no difference."""
    grad, weight = (torch.randn(n, 64, generator=generator).half() for n in (16, 24))
    kept = torch.ones(1, 1, dtype=torch.int8)
    tiles, other = device.Tiles(kept, (128, 128), backend.kernels().kept_product), weight.T.contiguous()
    for out in torch.ones(16, 24), torch.full((16, 24), -3.0):
        want = out + grad.float() @ other.float()
        tiles.matmul(grad, other, out, True)
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    out = torch.empty(16, 24)
    tiles.matmul(grad, other, out)
    torch.testing.assert_close(out, grad.float() @ other.float(), rtol=1e-4, atol=1e-4)
    assert len(timed) == times(kept_product)


def states_of(N: int, V: int, H: int, g: torch.Generator) -> None:
    hidden, weight = (torch.randn(n, H, generator=g).half() for n in (N, V))
    with torch.no_grad():
        fastloss.linear_cross_entropy(hidden, weight, torch.zeros(N, dtype=torch.int64))


def test_a_choice_is_made_once(timed, generator, monkeypatch):
    """For any N, and vocabularies of like size; not for another depth, and without a clock inside a captured graph."""
    states_of(3, 70, 16, generator)
    assert len(timed) == times(head_states)
    first = chosen(head_states)
    for N, V in (1, 70), (140, 70), (3, 100):
        states_of(N, V, 16, generator)
    assert len(timed) == times(head_states) and chosen(head_states) == first == head_states.configs[-1]
    states_of(3, 70, 32, generator)
    assert len(timed) == 2 * times(head_states)
    with monkeypatch.context() as inside:
        inside.setattr(tuning, "captures", lambda device: True)
        states_of(3, 70, 48, generator)
        assert chosen(head_states) == head_states.configs[0]
        states_of(3, 70, 16, generator)
        assert chosen(head_states) == first
    states_of(3, 70, 48, generator)
    assert chosen(head_states) == head_states.configs[0] and len(timed) == 2 * times(head_states)


def test_a_single_candidate_is_not_timed_while_a_graph_is_captured(monkeypatch):
    """As Triton before 3.9 would do it, and break the capture."""
    monkeypatch.setattr(tuning, "captures", lambda device: True)
    monkeypatch.setattr(tuning, "benchmark", lambda call, quantiles: pytest.fail("timed"))
    assert tuning._time(torch.device("cuda"), lambda: None, (0.5, 0.2, 0.8)) == [0.0] * 3


class _Driver:
    """Of NVIDIA: the calling thread's capture mode, by the one function that exchanges it."""

    mode = 0

    def cuThreadExchangeStreamCaptureMode(self, pointer):
        pointer._obj.value, self.mode = self.mode, pointer._obj.value


def test_kernels_may_be_loaded_while_a_graph_is_captured(monkeypatch):
    driver = _Driver()
    monkeypatch.setattr(capture, "_driver", lambda: driver)
    with pytest.raises(KeyError), capture.loading_allowed():
        assert driver.mode == 2
        raise KeyError
    assert driver.mode == 0
    monkeypatch.setattr(capture, "_driver", lambda: None)
    with capture.loading_allowed():
        pass


def test_what_finds_no_memory_to_be_timed_is_not_chosen_for_its_speed(monkeypatch):
    """A weight's gradient of gigabytes is copied, to be given back as it was."""

    def full(call, quantiles):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tuning, "captures", lambda device: False)
    monkeypatch.setattr(tuning, "benchmark", full)
    assert tuning._time(torch.device("cuda"), lambda: None, (0.5, 0.2, 0.8)) == [float("inf")] * 3


def test_nothing_is_timed_where_results_must_not_depend_on_it():
    gpu = torch.device("cuda")
    assert tuning.is_timed(gpu) and not tuning.is_timed(torch.device("cpu"))
    torch.use_deterministic_algorithms(True)
    try:
        assert not tuning.is_timed(gpu)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: case.name)
def test_logits_far_from_zero(engine, case, generator):
    for turn, dtype in enumerate((torch.float32, torch.bfloat16, torch.float64)):
        offset = (1e4, -1e4, 3e5, -3e7)[(CASES.index(case) + turn) % 4]
        x, y, options = case.inputs(3, 1501, dtype, generator)
        noise = 4e-16 * abs(offset) if dtype == torch.float64 else 0.0  # the float64 oracle's own
        assert_as_good_as_torch(fastloss.cross_entropy, case.oracle, x + offset, y, options, noise=noise)
