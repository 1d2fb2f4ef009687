"""What holds of every argument of every public function: the default device, tensors elsewhere, tensor subclasses,
tensors made under inference_mode, the function's name in errors."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import ONE_OF_EACH, on_engine
from linear_calls import ALL_CASES, Call, results
from public_calls import CALLS, outputs, tensors_of
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.testing._internal.two_tensor import TwoTensor

import fastloss
from fastloss import lm

# ---- the default device ---------------------------------------------------------------------------------------------

PACKAGE = Path(fastloss.__file__).parent
FACTORIES = {"arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones"}
FACTORIES |= {"rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"}


@pytest.mark.parametrize("path", sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py")), ids=str)
def test_every_factory_names_its_device(path: Path) -> None:
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in FACTORIES}:
            assert "device" in {k.arg for k in node.keywords}, f"{path}:{node.lineno} {ast.unparse(node)}"


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("engine", ONE_OF_EACH)
def test_default_device(name: str, engine: str) -> None:
    """What users set to "cuda"; tensors on the CPU stay there."""
    function, make = CALLS[name]
    arguments = make()
    with on_engine(engine):
        want = outputs(function(**arguments))
        with torch.device("meta"):
            found = outputs(function(**arguments))
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b) or (a.isnan() & b.isnan()).any()


@pytest.mark.parametrize("engine", ONE_OF_EACH)
@pytest.mark.parametrize("case", ALL_CASES, ids=lambda c: c.name)
def test_default_device_of_cases(case: Any, engine: str, generator: torch.Generator) -> None:
    x, target, options = case.inputs(5, 13, torch.float32, generator)
    call = Call(case, 5, 13, torch.float32, generator)
    upstream = case.upstream(5, generator)

    def run() -> list[Tensor]:
        leaf, made = x.clone().requires_grad_(), []
        for reduction in ("none", "mean"):
            more = {} if case.function == "selective_log_softmax" else {"reduction": reduction}
            if more and reduction == "none" and "normalizer" in options:
                continue
            arguments = {**options, **more}
            loss = case.loss()(leaf, target, **arguments) if "probs" not in arguments else None
            if loss is None:
                loss = case.loss()(leaf, target, arguments.pop("probs"), **arguments)
            g = upstream.to(loss.dtype) if loss.dim() else torch.ones_like(loss)
            made += [loss.detach(), *torch.autograd.grad(loss, leaf, g)]
        return made + results(call.ours, call.head, upstream if case.function == "selective_log_softmax" else None)

    with on_engine(engine):
        want = run()
        with torch.device("meta"):
            found = run()
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b)


# ---- tensors on another device --------------------------------------------------------------------------------------

ARGUMENTS = [(name, tensor) for name, (_, make) in CALLS.items() for tensor in tensors_of(make())]


# robust_loss: the others are numbers, which may stay on the CPU.
COMPARED = [(n, t) for n, t in ARGUMENTS if len(tensors_of(CALLS[n][1]())) > 1 and (n, t) != ("robust_loss", "input")]


@pytest.mark.parametrize(("name", "tensor"), COMPARED)
def test_tensors_elsewhere(name: str, tensor: str) -> None:
    function, make = CALLS[name]
    arguments = make()
    arguments[tensor] = arguments[tensor].to("meta")
    with pytest.raises(RuntimeError) as caught:
        function(**arguments)
    # Where the first is elsewhere, all others are named.
    message = str(caught.value)
    assert any(f"{argument}: expected a tensor on" in message for argument in tensors_of(arguments))
    assert tensor in message or tensor in tensors_of(arguments)[0]


def test_numbers_on_the_cpu_are_numbers() -> None:
    """As for torch: one element on the CPU, beside tensors on a device."""
    x, y = torch.empty(3, 5, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    for normalizer in (torch.tensor(3), torch.tensor([3.0], dtype=torch.float64)):
        with fastloss.use_backend("reference"):
            loss = fastloss.cross_entropy(x, y, reduction="sum", normalizer=normalizer)
        assert loss.device.type == "meta"


# ---- subclasses -----------------------------------------------------------------------------------------------------


class Tagged(Tensor):
    """A subclass that adds nothing."""


def waiting(x: Tensor) -> Tensor:
    return AsyncCollectiveTensor(x)


SUBCLASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "async": waiting,
    "tagged": lambda x: x.as_subclass(Tagged),
    "wrapper": lambda x: TwoTensor(x, x.clone()),
}


def plain(x: Tensor) -> Tensor:
    if isinstance(x, TwoTensor):
        return x.a
    if isinstance(x, AsyncCollectiveTensor):
        return x.trigger_wait()
    return x.as_subclass(Tensor)


@pytest.mark.parametrize(
    ("name", "tensor", "kind"),
    # What is added up in place is added twice by a wrapper that does everything twice.
    [(n, t, k) for n, t in ARGUMENTS for k in SUBCLASSES if (n[:14], k) != ("lm.Perplexity.", "wrapper")],
)
def test_subclasses(name: str, tensor: str, kind: str) -> None:
    """Any argument; the same numbers come back."""
    function, make = CALLS[name]
    want = outputs(function(**make()))
    arguments = make()
    arguments[tensor] = SUBCLASSES[kind](arguments[tensor])
    for a, b in zip(outputs(function(**arguments)), want, strict=True):
        torch.testing.assert_close(plain(a), b, rtol=1e-6, atol=1e-6, equal_nan=True)


GRADIENTS = [(n, t) for n, t in ARGUMENTS if t in ("input", "linear_weight", "linear_bias", "logits", "query", "key")]


@pytest.mark.parametrize("kind", SUBCLASSES)
@pytest.mark.parametrize(("name", "tensor"), GRADIENTS)
def test_gradients_through_subclasses(name: str, tensor: str, kind: str) -> None:
    function, make = CALLS[name]

    def gradient(wrap: Callable[[Tensor], Tensor]) -> Tensor | None:
        arguments = make()
        leaf = arguments[tensor].clone()
        leaf = (wrap(leaf) if kind == "wrapper" else leaf).requires_grad_()
        arguments[tensor] = leaf if kind == "wrapper" else wrap(leaf * 1)
        found = [t for t in outputs(function(**arguments)) if t.requires_grad]
        if not found:
            return None
        (grad,) = torch.autograd.grad(sum(t.sum() for t in found), leaf)
        return plain(grad)

    wrap = SUBCLASSES[kind]
    if kind == "async":  # what a differentiable collective returns
        wrap = Arriving.apply
    want = gradient(lambda x: x)
    got = gradient(wrap)
    if want is not None:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7, equal_nan=True)


class Arriving(torch.autograd.Function):
    """A tensor -> the same under way from other ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return AsyncCollectiveTensor(x.detach())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return plain(upstream)


def test_modes_and_subclasses_see_the_public_functions() -> None:
    seen = []

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    for name in ("kl_div_with_logits", "linear_kl_div", "row_stats", "lm.causal_lm_loss"):
        function, make = CALLS[name]
        arguments = make()
        with Watching():
            function(**arguments)
        assert function in seen


# ---- inference_mode -------------------------------------------------------------------------------------------------

# They are torch's operations, which save what they are given, or make no gradient.
TORCHS_OWN = {"kl_div", "mse_loss", "l1_loss", "binary_cross_entropy_with_logits", "cosine_similarity_loss"}
TORCHS_OWN |= {"robust_loss", "lm.Perplexity.update"}


@pytest.mark.parametrize("how", ["backward", "twice", "offloaded"])
@pytest.mark.parametrize("engine", ONE_OF_EACH)
@pytest.mark.parametrize("name", [n for n, t in GRADIENTS if t in ("input", "logits", "query") and n not in TORCHS_OWN])
def test_inference_tensors(name: str, engine: str, how: str) -> None:
    """All but what is differentiated was made under inference_mode, a teacher's logits first of all."""
    function, make = CALLS[name]
    source = tensors_of(make())[0]

    def grads(inference: bool) -> list[Tensor]:
        with torch.inference_mode(inference):
            arguments = make()
        leaf = arguments[source].clone().requires_grad_()
        arguments[source] = leaf
        with torch.autograd.graph.save_on_cpu() if how == "offloaded" else torch.autograd.set_grad_enabled(True):
            found = [t for t in outputs(function(**arguments)) if t.requires_grad]
        total = sum(t.sum() for t in found)
        first = torch.autograd.grad(total, leaf, create_graph=how == "twice")
        if how != "twice":
            return list(first)
        return [first[0].detach(), *torch.autograd.grad(first[0].square().sum(), leaf)]

    with on_engine(engine):
        torch.testing.assert_close(grads(True), grads(False), rtol=0, atol=0, equal_nan=True)


def test_a_teacher_made_under_inference_mode_is_not_copied() -> None:
    N, V = 64, 4000
    with torch.inference_mode():
        teacher = torch.randn(N, V)
    student = torch.randn(N, V, requires_grad=True)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as seen:
        fastloss.kl_div_with_logits(student, teacher)
    largest = max((e.cpu_memory_usage for e in seen.events() if e.cpu_memory_usage), default=0)
    assert largest < 1.1 * N * V * 4  # the gradient


# ---- errors ---------------------------------------------------------------------------------------------------------


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    for module, names in ((fastloss, fastloss.__all__), (lm, lm.__all__)):
        for name in names:
            function = getattr(module, name)
            if inspect.isfunction(function) and "Tensor" in str(inspect.signature(function)):
                yield name, function


NOT_OF_TENSORS = {"explain", "perplexity"}


def test_every_public_function_has_a_call() -> None:
    called = {function for function, _ in CALLS.values()}
    missing = {name for name, function in public_functions() if function not in called}
    assert missing <= NOT_OF_TENSORS


@pytest.mark.parametrize("name", [n for n in CALLS if n.partition(",")[0].replace("lm.", "").isidentifier()])
def test_errors_name_the_function(name: str) -> None:
    function, make = CALLS[name]
    if not hasattr(function, "__wrapped__"):
        pytest.skip("a lambda of the table")
    arguments = make()
    first = tensors_of(arguments)[-1]
    wrong = {**arguments, first: arguments[first].to("meta")} if len(tensors_of(arguments)) > 1 else {}
    with pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
        function(**wrong)
    assert str(caught.value).startswith(f"{function.__qualname__}()")


def test_the_outermost_function_is_named() -> None:
    x, y = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^causal_lm_loss\(\): softcap: expected a finite number > 0, got -1"):
        lm.causal_lm_loss(x, y, softcap=-1.0)
    with pytest.raises(TypeError, match=r"^linear_kl_div\(\) got an unexpected keyword argument 'inplace'"):
        fastloss.linear_kl_div(x[0], x[0], x[0], x[0], inplace=True)
    with pytest.raises(TypeError, match=r"^kl_div_with_logits\(\): argument 'temperature' must be float, not str"):
        fastloss.kl_div_with_logits(x, x, temperature="warm")
    with pytest.raises(ValueError, match=r"^linear_info_nce\(\): token_weight: expected shape \(3,\)"):
        fastloss.linear_info_nce(x[0], x[0], token_weight=y[0, :1])


# ---- numbers and weights of other dtypes ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float64], ids=str)
@pytest.mark.parametrize("name", [n for n, t in ARGUMENTS if t == "token_weight"])
def test_token_weights_of_any_dtype(name: str, dtype: torch.dtype) -> None:
    """Masks and counts are weights, in every loss that takes them."""
    function, make = CALLS[name]
    arguments = make()
    counts = (arguments["token_weight"] * 3).floor().to(dtype)
    found = outputs(function(**{**arguments, "token_weight": counts}))
    want = outputs(function(**{**arguments, "token_weight": counts.float()}))
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "int8", "uint16", "int64", "uint64", "bool_"])
@pytest.mark.parametrize("name", [n for n, t in ARGUMENTS if t == "normalizer"])
def test_normalizers_of_numpy(name: str, kind: str) -> None:
    function, make = CALLS[name]
    five = getattr(pytest.importorskip("numpy"), kind)(5)
    found = outputs(function(**{**make(), "normalizer": five}))
    want = outputs(function(**{**make(), "normalizer": float(five)}))
    torch.testing.assert_close(found, want, rtol=0, atol=0)


def test_complex_numbers_are_refused() -> None:
    x, y, q = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.full((2, 3), 1 / 3)
    with pytest.raises(
        RuntimeError, match=r"^cross_entropy\(\): normalizer: expected a real number, got torch.complex"
    ):
        fastloss.cross_entropy(x, y, reduction="sum", normalizer=torch.tensor(3 + 4j))
    with pytest.raises(RuntimeError, match="weight: expected real numbers"):
        fastloss.cross_entropy(x, q, torch.ones(3, dtype=torch.complex64))
    with pytest.raises(RuntimeError, match="negatives: expected floating point numbers"):
        fastloss.info_nce(x, x, negatives=x + 0j)


@pytest.mark.parametrize("loss", [fastloss.info_nce, fastloss.linear_info_nce])
def test_pairs_that_are_none(loss: Callable[..., Tensor]) -> None:
    x = torch.zeros(2, 3)
    for arguments, name in (((None, x), "query"), ((x, None), "key"), ((x, [1.0]), "key")):
        with pytest.raises(TypeError, match=f"{name}: expected a Tensor"):
            loss(*arguments)
    for temperature in ("warm", [1.0], None):
        with pytest.raises(TypeError, match="temperature: expected a real number"):
            loss(x, x, temperature=temperature)


@pytest.mark.parametrize("engine", ONE_OF_EACH)
def test_no_class_is_listed(engine: str) -> None:
    """K = 0: a row of nothing, as torch's gather has it, with a gradient of zero."""
    x, w = torch.randn(3, 5), torch.randn(7, 5)
    none = torch.zeros(3, 0, dtype=torch.int64)
    with on_engine(engine):
        for loss, given in (
            (fastloss.selective_log_softmax, (x,)),
            (fastloss.linear_selective_log_softmax, (x, w)),
        ):
            assert loss(*given, none).shape == (3, 0)
        for loss, given in (
            (fastloss.topk_cross_entropy, (x,)),
            (fastloss.topk_kl_div, (x,)),
            (fastloss.linear_topk_cross_entropy, (x, w)),
            (fastloss.linear_topk_kl_div, (x, w)),
        ):
            leaf = x.clone().requires_grad_()
            value = loss(leaf, *given[1:], none, none.float(), reduction="sum")
            (grad,) = torch.autograd.grad(value, leaf)
            assert value == 0 and not grad.any()
