"""PyTorch's own material for cross_entropy (OpInfo and ModuleInfo samples, reference functions), through fastloss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from engines import ONE_OF_EACH, on_engine
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastloss
from fastloss import _native

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.testing._internal imports modules that torch itself has deprecated
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db
        from torch.testing._internal.common_nn import loss_reference_fns
except ImportError as error:  # private, and different in every torch
    pytest.skip(f"torch.testing._internal of torch {torch.__version__}: {error}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

ISAS = _native.available_isas()
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REFERENCE = loss_reference_fns["CrossEntropyLoss"]
OP_SAMPLES, MODULE_SAMPLES = 21, 105  # in torch 2.13; fewer means that the material has moved, not that all is well


class Sample(NamedTuple):
    """One call: keyword arguments of the loss, and torch's reference value where its author gives one."""

    name: str
    input: Tensor
    target: Tensor
    options: dict[str, Any]
    reference: Callable[[], Tensor] | None


def op_samples(dtype: torch.dtype) -> list[Sample]:
    (info,) = [op for op in op_db if op.name == "nn.functional.cross_entropy"]
    found = []
    for i, s in enumerate(info.sample_inputs("cpu", dtype, requires_grad=True)):
        (target,) = s.args
        reference = None
        if s.input.dim() > 1 and dtype == torch.float64:
            reference = lambda s=s, target=target: REFERENCE(s.input, target, **s.kwargs)  # noqa: E731
        found.append(Sample(f"op{i}", s.input, target, s.kwargs, reference))
    assert len(found) >= OP_SAMPLES
    return found


def module_samples(dtype: torch.dtype) -> list[Sample]:
    (info,) = [m for m in module_db if m.module_cls is torch.nn.CrossEntropyLoss]
    found = []
    for i, s in enumerate(info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True)):
        assert not s.constructor_input.args
        assert not s.forward_input.kwargs
        options = s.constructor_input.kwargs
        input, target = s.forward_input.args
        reference = None
        if s.reference_fn is not None and dtype == torch.float64:
            module = torch.nn.CrossEntropyLoss(**options)
            plain = (input.detach(), target.detach())
            reference = lambda s=s, module=module, plain=plain: s.reference_fn(module, *plain)  # noqa: E731
        found.append(Sample(f"module{i}-{s.desc}", input, target, options, reference))
    assert len(found) >= MODULE_SAMPLES
    return found


SOURCES = {"op": op_samples, "module": module_samples}


@pytest.fixture(params=ONE_OF_EACH)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with on_engine(request.param):
        yield request.param


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.current_isa()
    _native.use_isa(request.param)
    with fastloss.use_backend("cpu"):
        yield request.param
    _native.use_isa(before)


def loss_and_grads(loss_fn: Callable[..., Tensor], sample: Sample, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The loss, and the gradients of the logits and of the probabilities that want one, for a fixed upstream."""

    def leaf(t: Tensor) -> Tensor:
        t = t.detach() if dtype is None or not t.is_floating_point() else t.detach().to(dtype)
        return t.clone().requires_grad_(t.is_floating_point())

    input, target = leaf(sample.input), leaf(sample.target).requires_grad_(sample.target.requires_grad)
    options = {k: v.to(dtype) if isinstance(v, Tensor) and dtype else v for k, v in sample.options.items()}
    loss = loss_fn(input, target, **options)
    upstream = torch.linspace(0.5, 1.5, loss.numel()).reshape(loss.shape).to(loss.dtype)
    leaves = [t for t in (input, target) if t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


def cancellation(sample: Sample, dtype: torch.dtype) -> float:
    """Rounding of the terms of a sum that may cancel: the class weights of these samples have both signs."""
    eps = 4 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    weight = sample.options.get("weight")
    largest = 1.0 if weight is None else max(1.0, float(weight.abs().max()))
    return eps * largest * max(1.0, float(sample.input.detach().abs().max()))


def check_sample(loss_fn: Callable[..., Tensor], sample: Sample) -> None:
    """Shape and dtype of torch; values and gradients that are as near to float64 as torch's, or nearer."""
    ours = loss_and_grads(loss_fn, sample)
    torchs = loss_and_grads(F.cross_entropy, sample)
    exact = loss_and_grads(F.cross_entropy, sample, torch.float64)
    for got, theirs, want in zip(ours, torchs, exact, strict=True):
        assert got.dtype == theirs.dtype and got.shape == theirs.shape, sample.name
        torch.testing.assert_close(got.isnan(), want.isnan(), msg=lambda m: f"{sample.name}: NaN\n{m}")
        ulps = 8 if got.dtype == torch.float64 else 1  # in float64 the oracle has rounded as well
        slack = ulps * torch.finfo(got.dtype).eps * want.nan_to_num().abs() + cancellation(sample, got.dtype)
        error, allowed = (got.double() - want).abs(), (theirs.double() - want).abs().nan_to_num().max()
        excess = float((error - allowed - slack).nan_to_num().max())
        assert excess <= 0, f"{sample.name}: {excess:.2g} beyond torch's own error {float(allowed):.2g}"


def module_call(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    return fastloss.CrossEntropyLoss(**options)(input, target)


CALLS = {"function": fastloss.cross_entropy, "module": module_call}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("call", CALLS)
def test_values_and_gradients(backend: str, call: str, source: str, dtype: torch.dtype) -> None:
    for sample in SOURCES[source](dtype):
        check_sample(CALLS[call], sample)
        # The OpInfo's probabilities want a gradient, which takes the differentiable path: the kernels need their turn.
        check_sample(CALLS[call], sample._replace(target=sample.target.detach()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_every_instruction_set(isa: str, source: str, dtype: torch.dtype) -> None:
    for sample in SOURCES[source](dtype):
        check_sample(fastloss.cross_entropy, sample._replace(target=sample.target.detach()))


@pytest.mark.parametrize("source", SOURCES)
def test_reference_functions(backend: str, source: str) -> None:
    checked = 0
    for sample in SOURCES[source](torch.float64):
        if sample.reference is None:
            continue
        got, want = fastloss.cross_entropy(sample.input, sample.target, **sample.options), sample.reference()
        torch.testing.assert_close(got, want, equal_nan=True, msg=lambda m, s=sample: f"{s.name}: {m}")
        checked += 1
    assert checked >= {"op": OP_SAMPLES, "module": MODULE_SAMPLES}[source]


def differentiable(sample: Sample, wants_target: bool) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    input = sample.input.detach().clone().requires_grad_()
    if wants_target and sample.target.requires_grad:
        target = sample.target.detach().clone().requires_grad_()
        return lambda x, q: fastloss.cross_entropy(x, q, **sample.options), (input, target)
    target = sample.target.detach()
    return lambda x: fastloss.cross_entropy(x, target, **sample.options), (input,)


def gradcheckable(sample: Sample) -> bool:
    """A mean of nothing is NaN, and numerical differences of NaN say nothing; its zero gradient is checked above."""
    return bool(fastloss.cross_entropy(sample.input, sample.target, **sample.options).isfinite().all())


@pytest.mark.parametrize("wants_target", [False, True], ids=["logits", "logits+probabilities"])
@pytest.mark.parametrize("source", SOURCES)
def test_gradcheck(backend: str, source: str, wants_target: bool) -> None:
    samples = SOURCES[source](torch.float64)
    checked = 0
    for sample in filter(gradcheckable, samples):
        fn, inputs = differentiable(sample, wants_target)
        # As torch's own harness asks of this operator: batched and forward-mode gradients as well.
        small, batched = inputs[0].numel() <= 32, source == "op"
        assert gradcheck(
            fn,
            inputs,
            fast_mode=not small,
            check_batched_grad=batched,
            check_forward_ad=True,
            check_batched_forward_grad=batched,
        ), sample.name
        checked += 1
    assert checked >= len(samples) - 4


@pytest.mark.parametrize("wants_target", [False, True], ids=["logits", "logits+probabilities"])
@pytest.mark.parametrize("source", SOURCES)
def test_gradgradcheck(backend: str, source: str, wants_target: bool) -> None:
    samples = SOURCES[source](torch.float64)
    checked = 0
    for sample in filter(gradcheckable, samples):
        fn, inputs = differentiable(sample, wants_target)
        op = source == "op"
        assert gradgradcheck(
            fn, inputs, fast_mode=not op, check_batched_grad=op, check_fwd_over_rev=op, check_rev_over_rev=True
        ), sample.name
        checked += 1
    assert checked >= len(samples) - 4
