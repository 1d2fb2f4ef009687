"""PyTorch's own material for linear_cross_entropy (OpInfo and ModuleInfo samples, error inputs), through fastloss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from check import error
from engines import ONE_OF_EACH, on_engine
from torch import Tensor

import fastloss

if not hasattr(torch.nn.functional, "linear_cross_entropy"):
    pytest.skip("torch has it from 2.13 on", allow_module_level=True)
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.testing._internal imports modules that torch itself has deprecated
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db
except ImportError as problem:  # private, and different in every torch
    pytest.skip(f"torch.testing._internal of torch {torch.__version__}: {problem}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")
OPS = {op.variant_test_name: op for op in op_db if op.name == "nn.functional.linear_cross_entropy"}
(MODULE,) = [m for m in module_db if m.module_cls is torch.nn.LinearCrossEntropyLoss]
SAMPLES = {"": 119, "chunked": 133, "chunked_none": 77}  # in torch 2.13; fewer means that the material has moved
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(params=ONE_OF_EACH, autouse=True)
def backend(request: pytest.FixtureRequest):
    with on_engine(request.param):
        yield request.param


def outcome(
    f: Callable[..., Tensor], tensors: list[Tensor], wanted: list[bool], dtype: torch.dtype | None
) -> list[Tensor]:
    """The loss and the gradients of those that want one, for a fixed upstream gradient."""
    leaves = [t.detach().to(t.dtype if dtype is None or not t.is_floating_point() else dtype) for t in tensors]
    leaves = [t.clone().requires_grad_(w) for t, w in zip(leaves, wanted, strict=True)]
    loss = f(*leaves)
    upstream = torch.linspace(0.5, 1.5, loss.numel()).reshape(loss.shape).to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, [t for t in leaves if t.requires_grad], upstream)]


def check(ours: Any, torchs: Any, tensors: list[Tensor], wanted: list[bool], name: str) -> None:
    """Shapes and dtypes of torch; errors against float64 no larger than its own."""
    got, same, exact = (
        outcome(ours, tensors, wanted, None),
        *(outcome(torchs, tensors, wanted, d) for d in (None, torch.float64)),
    )
    # What float64 itself rounds, where a bias sets all logits far from zero.
    largest = [float(t.detach().abs().max()) for t in tensors if t.is_floating_point() and t.numel()]
    noise = torch.finfo(torch.float64).eps * max(1.0, *largest)
    for a, b, t in zip(got, same, exact, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        slack = 8 * max(torch.finfo(a.dtype).eps, noise)
        allowed = error(b, t, 1.0)
        allowed = allowed if allowed < float("inf") else 0.0
        found = error(a, t, 1.0)
        assert found <= allowed + slack, f"{name}: {found:.2e}, torch {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", OPS)
def test_op_samples(variant: str, dtype: torch.dtype) -> None:
    count = 0
    for i, sample in enumerate(OPS[variant].sample_inputs("cpu", dtype, requires_grad=True)):
        weight, target = sample.args
        options = dict(sample.kwargs)
        more = {k: options.pop(k) for k in ("linear_bias", "weight") if isinstance(options.get(k), Tensor)}
        plain = {k: v for k, v in options.items() if k != "options"}

        def call(f, *tensors, names=tuple(more), options=options):
            return f(*tensors[:3], **dict(zip(names, tensors[3:], strict=True)), **options)

        tensors = [sample.input, weight, target, *more.values()]
        # Class weights have no gradient here: torch's own want none.
        wanted = [True, True, False, *(name == "linear_bias" for name in more)]
        ours = lambda *t, call=call: call(fastloss.linear_cross_entropy, *t)  # noqa: E731
        torchs = lambda *t, call=call, plain=plain: call(  # noqa: E731
            torch.nn.functional.linear_cross_entropy, *t, options=plain
        )
        check(ours, torchs, tensors, wanted, f"{variant}{i}")
        count += 1
    assert count >= SAMPLES[variant]


def test_op_errors() -> None:
    count = 0
    for given in OPS[""].error_inputs("cpu"):
        sample = given.sample_input
        if sample.input.dim() > 2:
            continue  # hidden states may have any leading dimensions here
        with pytest.raises(given.error_type, match=given.error_regex):
            fastloss.linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)
        count += 1
    assert count >= 5


@pytest.mark.filterwarnings("ignore:linear_cross_entropy. ..options.. ignored:UserWarning")  # torch's own
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_module_samples(dtype: torch.dtype) -> None:
    samples = MODULE.module_inputs_func(MODULE, device="cpu", dtype=dtype, requires_grad=True, training=True)
    for i, sample in enumerate(samples):
        made, (input, target) = sample.constructor_input, sample.forward_input.args
        modules = [
            cls(*made.args, **made.kwargs) for cls in (fastloss.LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss)
        ]
        modules[1].load_state_dict(modules[0].state_dict())
        names = [name for name, _ in modules[0].named_parameters()]
        tensors = [input, target, *modules[0].parameters()]

        def call(module, x, y, *parameters, names=names):
            named = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(module, named, (x, y))

        def exact(x, y, *parameters, module=modules[1], call=call):
            module.options = None  # the reference, which every dtype can have
            if module.weight is not None:
                module.weight = module.weight.to(x.dtype)
            return call(module, x, y, *parameters)

        wanted = [t.is_floating_point() and t is not target for t in tensors]
        check(lambda *t, m=modules[0], c=call: c(m, *t), exact, tensors, wanted, f"module{i}")
    assert len(samples) > 100
