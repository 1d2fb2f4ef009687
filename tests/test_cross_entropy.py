"""cross_entropy on every engine: the case table against the float64 textbook."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, DTYPES, SHAPES, VOCABULARIES, in_turn
from check import assert_as_good_as_torch, value_and_grad

import fastloss


def _case_id(case):
    return case.name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=_case_id)
def test_case(engine, case, dtype, reduction, generator):
    if reduction == "none" and case.name in ("normalizer", "everything"):
        pytest.skip("a normalizer divides a mean or a sum")
    for N, V in in_turn(engine, SHAPES.values(), CASES.index(case) + DTYPES.index(dtype), dtype):
        x, y, options = case.inputs(N, V, dtype, generator)
        upstream = torch.rand(N, generator=generator) if reduction == "none" else None
        assert_as_good_as_torch(
            fastloss.cross_entropy, case.oracle, x, y, {**options, "reduction": reduction}, upstream
        )


@pytest.mark.parametrize("V", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_vocabularies(engine, V, dtype, generator):
    for case in CASES[0], CASES[-1]:
        x, y, options = case.inputs(3, V, dtype, generator)
        assert_as_good_as_torch(fastloss.cross_entropy, case.oracle, x, y, options)


@pytest.mark.parametrize("kind", ["random", "stride_0", "non_contiguous"])
def test_upstream_gradients(engine, kind, generator):
    upstream = {
        "random": torch.randn(6, generator=generator),
        "stride_0": torch.tensor(0.3).expand(6),
        "non_contiguous": torch.randn(6, 3, generator=generator)[:, 1],
    }[kind]
    x, y, _ = CASES[0].inputs(6, 100, torch.float32, generator)
    assert_as_good_as_torch(fastloss.cross_entropy, CASES[0].oracle, x, y, {"reduction": "none"}, upstream)


@pytest.mark.parametrize("upstream", [1.0, 0.125, 3.0, -2.0, 0.0, 32768.0])
def test_reduced_upstream_gradients(engine, upstream, generator):
    """The forward guesses the upstream gradient; right or wrong, the gradient is the same to the bit."""
    for dtype in torch.float32, torch.float16:
        x, y, _ = CASES[0].inputs(6, 3000, dtype, generator)
        first = value_and_grad(fastloss.cross_entropy, x, torch.tensor(upstream), y)[1]
        second = value_and_grad(fastloss.cross_entropy, x, torch.tensor(upstream), y)[1]
        assert torch.equal(first, second)
        assert_as_good_as_torch(fastloss.cross_entropy, CASES[0].oracle, x, y, {}, torch.tensor(upstream))


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "padded_rows": lambda x: torch.cat([x, x[:, :3]], 1)[:, : x.shape[1]],
    "every_other_row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every_other_class": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "one_row_for_all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(engine, layout, dtype, generator):
    """Any strides give the bits of the contiguous copy; no layout reads what is not its own."""
    for case in CASES[0], CASES[-1]:
        x, y, options = case.inputs(7, 1003, dtype, generator)
        strided = LAYOUTS[layout](x).detach().requires_grad_()
        loss = fastloss.cross_entropy(strided, y, **options)
        (grad,) = torch.autograd.grad(loss, strided)
        expected = value_and_grad(fastloss.cross_entropy, strided.detach().contiguous(), None, y, **options)
        assert torch.equal(loss, expected[0])
        assert torch.equal(grad, expected[1])


@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 5, 3), (2, 5, 3, 2), (2, 5, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_shapes_of_torch(engine, shape, soft, generator):
    class_dim = 0 if len(shape) == 1 else 1
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if soft:
        y = torch.randn(shape, generator=generator, dtype=torch.float64).softmax(class_dim)
    else:
        y = torch.randint(5, shape[:class_dim] + shape[class_dim + 1 :], generator=generator)
    for reduction in "none", "mean", "sum":
        got = value_and_grad(fastloss.cross_entropy, x, None, y, reduction=reduction)
        expected = value_and_grad(torch.nn.functional.cross_entropy, x, None, y, reduction=reduction)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("target_dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_target_dtypes(engine, target_dtype, generator):
    x, y, _ = CASES[0].inputs(9, 200, torch.float32, generator)
    assert torch.equal(fastloss.cross_entropy(x, y.to(target_dtype)), fastloss.cross_entropy(x, y))


def test_stats(engine, generator):
    for soft in False, True:
        x = torch.randn(6, 50, generator=generator, dtype=torch.float64).requires_grad_()
        y = torch.randint(50, (6,), generator=generator)
        y[2] = -100
        counts = torch.ones(6, dtype=torch.bool) if soft else y >= 0
        q = torch.rand(6, 50, generator=generator, dtype=torch.float64).softmax(1) if soft else None
        loss, stats = fastloss.cross_entropy(x, y if q is None else q, return_stats=True)
        log_p = x.log_softmax(1)
        log_prob = (q * log_p).sum(1) if soft else torch.where(y < 0, 0, log_p.gather(1, y.clamp(0)[:, None])[:, 0])
        of_all = (x.logsumexp(1), log_prob, -(log_p.exp() * log_p).sum(1))
        expected = tuple(torch.where(counts, t, 0) for t in of_all)
        torch.testing.assert_close(stats[:3], expected)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x, y if q is None else q))
        assert torch.equal(stats.argmax, torch.where(counts, x.argmax(1), 0))
        assert stats.correct is None if soft else torch.equal(stats.correct, x.argmax(1) == y)
        weights = [torch.rand(6, generator=generator, dtype=torch.float64) for _ in range(3)]
        got = torch.autograd.grad([loss, *stats[:3]], x, [torch.tensor(2.0).double(), *weights])
        loss_again = torch.nn.functional.cross_entropy(x, y if q is None else q)
        want = torch.autograd.grad([loss_again, *expected], x, [torch.tensor(2.0).double(), *weights])
        torch.testing.assert_close(got, want)


def test_out_dtype_and_autocast(engine, generator):
    x, y, _ = CASES[0].inputs(9, 200, torch.bfloat16, generator)
    assert fastloss.cross_entropy(x, y).dtype == torch.bfloat16
    exact = torch.nn.functional.cross_entropy(x.double(), y)
    with torch.autocast("cpu"):
        under_autocast = fastloss.cross_entropy(x, y)
    for loss in fastloss.cross_entropy(x, y, out_dtype=torch.float32), under_autocast:
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)


def test_normalizer_may_be_a_tensor(engine, generator):
    x, y, _ = CASES[0].inputs(9, 200, torch.float32, generator)
    number = fastloss.cross_entropy(x, y, normalizer=5)
    assert torch.equal(number, fastloss.cross_entropy(x, y, normalizer=torch.tensor(5)))
    torch.testing.assert_close(number, fastloss.cross_entropy(x, y, reduction="sum") / 5)
