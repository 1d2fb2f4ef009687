"""Every loss over a vocabulary but cross_entropy, on every engine: the case table against the float64 textbook."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, LOSS_CASES, SHAPES, VOCABULARIES, in_turn
from check import assert_as_good_as_torch, assert_case, value_and_grad

import fastloss

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: case.name)
def test_case(engine, case, dtype, generator):
    shapes = in_turn(engine, SHAPES.values(), LOSS_CASES.index(case) + DTYPES.index(dtype), dtype)
    for turn, (N, V) in enumerate(shapes):
        assert_case(case, N, V, dtype, ("mean", "none", "sum")[turn % 3], generator)


@pytest.mark.parametrize("V", VOCABULARIES.values(), ids=VOCABULARIES)
def test_real_vocabularies(engine, V, generator):
    for dtype in torch.float32, torch.bfloat16:
        for case in LOSS_CASES[:: 3 if V == 32000 else 7]:
            assert_case(case, 2, V, dtype, "mean", generator)


@pytest.mark.parametrize("offset", [1e4, -1e4, 3e5])
def test_logits_far_from_zero(engine, offset, generator):
    for turn, case in enumerate(LOSS_CASES):
        dtype = (torch.float32, torch.float64)[turn % 2]
        x, y, options = case.inputs(3, 1501, dtype, generator)
        options.pop("softcap", None)
        if engine == "reference" and options.keys() & {"temperature", "logit_scale"}:
            continue  # rounds the scaled logits, as torch does, where the kernels scale differences
        upstream = case.upstream(3, generator) if case.function == "selective_log_softmax" else None
        y = y + offset if y.is_floating_point() else y
        noise = 4e-16 * abs(offset) if dtype == torch.float64 else 0.0  # the float64 oracle's own
        assert_as_good_as_torch(case.loss(), case.oracle, x + offset, y, options, upstream, noise)


@pytest.mark.parametrize("kind", ["stride_0", "non_contiguous"])
def test_upstream_gradients(engine, kind, generator):
    upstream = {
        "stride_0": torch.tensor(0.3).expand(6),
        "non_contiguous": torch.randn(6, 3, generator=generator)[:, 1],
    }[kind]
    for case in LOSS_CASES[:-1]:
        x, y, options = case.inputs(6, 100, torch.float32, generator)
        assert_as_good_as_torch(case.loss(), case.oracle, x, y, {**options, "reduction": "none"}, upstream)


@pytest.mark.parametrize("upstream", [0.125, -2.0, 0.0])
def test_reduced_upstream_gradients(engine, upstream, generator):
    for case in LOSS_CASES[:-1]:
        x, y, options = case.inputs(4, 300, torch.float32, generator)
        assert_as_good_as_torch(case.loss(), case.oracle, x, y, options, torch.tensor(upstream))


def test_layouts_and_leading_dimensions(engine, generator):
    """(..., V) of any strides gives the bits of the contiguous rows."""
    for case in LOSS_CASES[:-1]:
        x, y, options = case.inputs(6, 203, torch.float32, generator)
        options = {k: v for k, v in options.items() if k not in ("mask", "token_weight")}
        want = value_and_grad(case.loss(), x, None, y, **options)
        rows = {"padded": torch.cat([x, x[:, :3]], 1)[:, :203], "transposed": x.t().contiguous().t()}
        for strided in rows.values():
            leaf = strided.detach().requires_grad_()
            loss = case.loss()(leaf, y, **options)
            same(loss, want[0], engine)
            same(torch.autograd.grad(loss, leaf)[0], want[1], engine)
        deep = {k: v.reshape(2, 3, -1) if k == "probs" else v for k, v in options.items()}
        got = value_and_grad(case.loss(), x.view(2, 3, 203), None, y.reshape(2, 3, -1), **deep)
        same(got[0], want[0], engine)
        same(got[1].view(6, 203), want[1], engine)


def same(a: torch.Tensor, b: torch.Tensor, engine: str) -> None:
    """To the bit, but for the reference, whose sums are torch's."""
    tolerance = 1e-6 if engine == "reference" else 0
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_masked_vocabulary(engine, generator):
    """Classes of -inf on both sides do not exist: the loss is that of the others, their gradient exactly zero."""
    keep = torch.rand(300, generator=generator) < 0.5
    for case in LOSS_CASES:
        for dtype in torch.float32, torch.bfloat16:
            x, y, options = case.inputs(4, 300, dtype, generator)
            if not case.objective.paired or "softcap" in options:
                continue
            masked, teacher = (torch.where(keep, t, -torch.inf) for t in (x, y))
            got = value_and_grad(case.loss(), masked, None, teacher, **options)
            want = value_and_grad(case.loss(), x[:, keep].contiguous(), None, y[:, keep].contiguous(), **options)
            torch.testing.assert_close(got[0], want[0])
            torch.testing.assert_close(got[1][:, keep], want[1])
            assert (got[1][:, ~keep] == 0).all()


@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_gradients_are_finite_at_any_logits(engine, scale, generator):
    """Where probabilities underflow, and the expressions over softmaxes give NaN."""
    for case in LOSS_CASES:
        x, y, options = case.inputs(4, 500, torch.float32, generator)
        if not case.objective.paired:
            continue
        loss, grad = value_and_grad(case.loss(), x * scale, None, y * scale, **options)
        assert loss.isfinite() and grad.isfinite().all(), case.name


def test_a_row_without_weight_shows_nothing(engine, generator):
    """Neither NaN nor infinity of a row that counts for nothing reaches the loss or a gradient."""
    for case in LOSS_CASES[:-1]:
        x, y, options = case.inputs(5, 200, torch.float32, generator)
        options["mask"] = torch.tensor([True, False, True, True, False])
        bad = x.clone()
        bad[1], bad[4, 7] = torch.nan, torch.inf
        for reduction in "mean", "none":
            got = value_and_grad(case.loss(), bad, None, y, **options, reduction=reduction)
            want = value_and_grad(case.loss(), x, None, y, **options, reduction=reduction)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), case.name


def test_no_rows(engine):
    for case in LOSS_CASES[:-1]:
        x, y, options = case.inputs(0, 50, torch.float32, torch.Generator())
        options = {k: v for k, v in options.items() if k not in ("mask", "token_weight")}
        assert case.loss()(x, y, **options).isnan(), case.name
        assert case.loss()(x, y, **options, reduction="sum") == 0, case.name


def test_a_tail_of_nearly_nothing(engine, generator):
    """The tail's probability keeps its digits below the rounding of one."""
    case = next(case for case in LOSS_CASES if case.name == "topk_tail")
    for gap in 5.0, 20.0, 60.0:
        x, y, options = case.inputs(3, 400, torch.float32, generator)
        x = x.scatter(1, y, x.gather(1, y) + gap)
        loss, grad = value_and_grad(case.loss(), x, None, y, **options)
        want = value_and_grad(case.oracle, x.double(), None, y, **options)
        torch.testing.assert_close((loss, grad), tuple(t.float() for t in want), rtol=2e-6, atol=1e-8)


def test_inplace(engine, generator):
    for case in LOSS_CASES[:-1]:
        x, y, options = case.inputs(4, 300, torch.float32, generator)
        leaf = x.clone().requires_grad_()
        logits = leaf * 1
        case.loss()(logits, y, **options, inplace=True).backward()
        assert torch.equal(leaf.grad, value_and_grad(case.loss(), x, None, y, **options)[1]), case.name


def test_out_dtype_and_batchmean(engine, generator):
    x, y = torch.randn(2, 3, 50, generator=generator), torch.randn(2, 3, 50, generator=generator)
    total = fastloss.kl_div_with_logits(x, y, reduction="sum")
    torch.testing.assert_close(fastloss.kl_div_with_logits(x, y, reduction="batchmean"), total / 2)
    torch.testing.assert_close(fastloss.kl_div_with_logits(x, y), total / 6)
    half = fastloss.kl_div_with_logits(x.bfloat16(), y.bfloat16())
    assert half.dtype == torch.bfloat16
    assert fastloss.kl_div_with_logits(x.bfloat16(), y.bfloat16(), out_dtype=torch.float64).dtype == torch.float64


def test_teacher_may_learn(generator):
    """A target that requires a gradient gets the textbook's."""
    x, u = (torch.randn(3, 20, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    for case in LOSS_CASES:
        if case.objective.paired:
            options = case.options(3, 20, torch.float64, generator)
            got = torch.autograd.grad(case.loss()(x, u, **options), (x, u))
            want = torch.autograd.grad(case.oracle(x, u, **options), (x, u))
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("case", [case for case in LOSS_CASES if "squashed" not in case.name], ids=lambda c: c.name)
def test_second_derivatives(case, generator):
    x, y, options = case.inputs(3, 11, torch.float64, generator)
    options = {k: v.double() if k == "probs" else v for k, v in options.items()}
    loss = lambda t: case.loss()(t, y, **options)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (x.requires_grad_(),))
    assert torch.autograd.gradgradcheck(loss, (x,))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch._dynamo's own
@pytest.mark.parametrize("case", LOSS_CASES[::3], ids=lambda case: case.name)
def test_compiles_in_one_graph(case, generator):
    x, y, options = case.inputs(3, 64, torch.float32, generator)
    compiled = torch.compile(lambda t: case.loss()(t, y, **options), fullgraph=True, backend="aot_eager")
    upstream = case.upstream(3, generator) if case.function == "selective_log_softmax" else None
    got, want = (value_and_grad(f, x, upstream) for f in (compiled, lambda t: case.loss()(t, y, **options)))
    torch.testing.assert_close(got, want)


def test_functional_transforms(generator):
    for case in LOSS_CASES[::4]:
        x, y, options = case.inputs(3, 20, torch.float64, generator)
        loss = lambda t: case.loss()(t, y, **options).sum()  # noqa: B023, E731
        torch.testing.assert_close(torch.func.grad(loss)(x), value_and_grad(loss, x, None)[1])
