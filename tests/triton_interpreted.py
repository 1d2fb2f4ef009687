"""The tests of the losses on the triton backend in Triton's interpreter, which decides when triton is imported whether
it takes the kernels. So test_triton.py starts another Python for this file."""

from __future__ import annotations

import os
from collections.abc import Iterator

import cases
import pytest
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

import fastloss

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of infinities and NaN
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


@pytest.mark.parametrize(("options", "reduction", "filter_eps"), [("bias", "none", 0.0), ("smoothing", "mean", 1e-7)])
def test_head_gradients(engine, options, reduction, filter_eps, generator):
    given = {**test_triton_heads.OPTIONS[options], "filter_eps": filter_eps}
    test_triton_head_grads.check(70, 140, 21, torch.float16, generator, reduction, **given)


@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: case.name)
def test_logits_far_from_zero(engine, case, generator):
    for turn, dtype in enumerate((torch.float32, torch.bfloat16, torch.float64)):
        offset = (1e4, -1e4, 3e5, -3e7)[(CASES.index(case) + turn) % 4]
        x, y, options = case.inputs(3, 1501, dtype, generator)
        noise = 4e-16 * abs(offset) if dtype == torch.float64 else 0.0  # the float64 oracle's own
        assert_as_good_as_torch(fastloss.cross_entropy, case.oracle, x + offset, y, options, noise=noise)
