"""The matrix products of losses of hidden states, on every instruction set, against float64."""

from __future__ import annotations

import pytest
import torch

from fastloss.backends import native, products
from fastloss.spec import COMPUTE_DTYPE

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# (M, N, K): whole register tiles and what is left of them, one of each, either operand the larger, sums longer than
# what is added up between two stores and of an odd number of terms, no terms at all.
SHAPES = [(1, 1, 1), (6, 16, 8), (12, 32, 4), (13, 33, 5), (7, 200, 70), (200, 7, 70), (50, 70, 2103), (3, 5, 0)]


def operand(rows: int, cols: int, dtype: torch.dtype, layout: str, g: torch.Generator) -> torch.Tensor:
    x = torch.randn(rows, cols, generator=g).to(dtype)
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "every_other":
        return x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]
    return x


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every_other"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(isa, dtype, layout, generator):
    F = COMPUTE_DTYPE[dtype]
    tolerance = 1e-13 if torch.float64 == F else 2e-6
    for M, N, K in SHAPES:
        for other in ("contiguous", layout):
            a, b = operand(M, K, dtype, layout, generator), operand(K, N, dtype, other, generator)
            start = torch.randn(N, generator=generator).to(F)
            exact = a.double() @ b.double()
            scale = max(1.0, K**0.5)
            out = torch.full((M, N + 3), 7.0, dtype=F)[:, :N]  # rows with a gap
            native.matmul(a, b, out)
            torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance * scale)
            native.matmul(a, b, out, add=True)
            torch.testing.assert_close(out.double(), 2 * exact, rtol=tolerance, atol=4 * tolerance * scale)
            native.matmul(a, b, out, start=start)
            torch.testing.assert_close(out.double(), exact + start, rtol=tolerance, atol=2 * tolerance * scale)
            assert (out.as_strided((M, 3), (N + 3, 1), N)[:-1] == 7).all(), "the gap is not its own"


def test_mixed_dtypes(isa, generator):
    """A float32 gradient of logits times 16-bit weights, without a copy of either."""
    for left, right in (torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.bfloat16, torch.float16):
        a, b = operand(9, 40, left, "contiguous", generator), operand(40, 21, right, "contiguous", generator)
        out = torch.empty(9, 21)
        native.matmul(a, b, out)
        torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=2e-6, atol=1e-5)


def test_a_row_is_the_same_in_any_company(isa, generator):
    """To the bit: whatever rows are around it, and however many threads."""
    threads = torch.get_num_threads()
    a, b = torch.randn(70, 1500, generator=generator), torch.randn(1500, 90, generator=generator)
    whole, part = torch.empty(70, 90), torch.empty(70, 90)
    native.matmul(a, b, whole)
    try:
        for count in 1, 2, 3:
            torch.set_num_threads(count)
            for rows in 1, 5, 12, 70:
                for i in range(0, 70, rows):
                    native.matmul(a[i : i + rows], b, part[i : i + rows])
                assert torch.equal(part, whole)
    finally:
        torch.set_num_threads(threads)


def test_infinities_stay_where_they_are(isa):
    """What pads a tile touches no number."""
    a, b = torch.ones(5, 3), torch.ones(3, 7)
    a[4, 0], b[1, 6] = torch.inf, torch.nan
    out = torch.empty(5, 7)
    native.matmul(a, b, out)
    assert out[:4, :6].eq(3).all() and out[4, :6].isinf().all() and out[:, 6].isnan().all()


def test_wrong_sizes_are_refused():
    module = native._native
    a = (64, 2, 3, 3, 1, 0)
    for b, out, stride in (((64, 4, 5, 5, 1, 0), 64, 5), ((64, 3, 5, 5, 1, 1), 64, 5), ((64, 3, 5, 5, 1, 0), 64, 4)):
        with pytest.raises(ValueError, match="matmul:"):
            module.matmul(a, b, out, stride, 0, False, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_own(dtype, generator):
    """What other backends take: operands' dtypes may differ from each other and from the sum's."""
    F = COMPUTE_DTYPE[dtype]
    for out_dtype in {dtype, F}:
        a, b, start = (torch.randn(s, generator=generator).to(dtype) for s in ((5, 8), (8, 6), (6,)))
        exact, out = a.double() @ b.double(), torch.empty(5, 6, dtype=out_dtype)
        eps = 8 * torch.finfo(dtype).eps
        products.matmul(a, b, out, start=start)
        torch.testing.assert_close(out.double(), exact + start.double(), rtol=eps, atol=4 * eps)
        products.matmul(a, b, out)
        products.matmul(a, b.float().to(F), out, add=True)
        torch.testing.assert_close(out.double(), 2 * exact, rtol=eps, atol=8 * eps)
