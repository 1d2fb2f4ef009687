"""torch.compile, torch.export, fake tensors, make_fx, opcheck, and whoever listens to torch's calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastloss
from fastloss.spec import Objective, Spec

pytestmark = pytest.mark.filterwarnings(
    # torch's compiler still uses what torch itself deprecates,
    "ignore:.class 'torch.autograd.function.Function'. should not be instantiated:DeprecationWarning",
    # and Dynamo reads the .grad of every input, also of those that are not leaves.
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)

N, V = 6, 37
Loss = Callable[..., Any]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()


def logits(*shape: int) -> Tensor:
    return 3 * torch.randn(shape or (N, V))


def classes(n: int = N) -> Tensor:
    y = torch.randint(V, (n,))
    y[0] = -100
    return y


def same_as_torch(loss: Loss, x: Tensor, y: Tensor, **options: Any) -> None:
    """Value and gradient of loss(x, y) against F.cross_entropy."""
    results = []
    for fn in (loss, lambda x, y: F.cross_entropy(x, y, **options)):
        leaf = x.clone().requires_grad_()
        value = fn(leaf * 2, y)
        (value * 0.7).sum().backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(*results)


OPTIONS: dict[str, tuple[bool, dict[str, Any]]] = {
    "mean": (False, {}),
    "sum": (False, {"reduction": "sum"}),
    "none": (False, {"reduction": "none"}),
    "smoothed": (False, {"label_smoothing": 0.1}),
    "weighted": (False, {"weight": torch.linspace(0.5, 2, V)}),
    "probabilities": (True, {"label_smoothing": 0.1}),
}
options = pytest.mark.parametrize("name", OPTIONS)


@options
def test_compile(name: str) -> None:
    soft, kwargs = OPTIONS[name]
    compiled = torch.compile(lambda x, y: fastloss.cross_entropy(x, y, **kwargs), fullgraph=True, dynamic=False)
    for _ in range(2):
        same_as_torch(compiled, logits(), logits().softmax(-1) if soft else classes(), **kwargs)
    with torch.no_grad():
        x, y = logits(), classes()
        if not soft:
            torch.testing.assert_close(compiled(x, y), F.cross_entropy(x, y, **kwargs))


def test_compile_once_for_every_batch_size() -> None:
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return fastloss.cross_entropy(x, y)

    inductor = torch.compile(loss, fullgraph=True)
    counted = torch.compile(loss, fullgraph=True, backend=counting)
    for n in (6, 9, 17):
        x, y = logits(n, V), classes(n)
        for fn in (inductor, counted):
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(y, 0)
            torch.testing.assert_close(fn(x, y), F.cross_entropy(x, y))
        same_as_torch(inductor, x, y)
    assert len(graphs) == 1


def test_compile_statistics() -> None:
    compiled = torch.compile(
        lambda x, y: fastloss.cross_entropy(x, y, return_stats=True, z_loss=1e-3, softcap=5.0), fullgraph=True
    )
    x, y = logits(), classes()
    results = []
    for fn in (compiled, lambda x, y: fastloss.cross_entropy(x, y, return_stats=True, z_loss=1e-3, softcap=5.0)):
        leaf = x.double().requires_grad_()
        loss, stats = fn(leaf, y)
        (loss + stats.entropy.sum() + stats.lse.mean() + stats.log_prob.sum()).backward()
        results.append((loss.detach(), *(t.detach() for t in stats), leaf.grad))
    torch.testing.assert_close(*results)


STRIDED: dict[str, tuple[Loss, Loss]] = {
    "kl": (
        fastloss.kl_div_with_logits,
        lambda x, u: F.kl_div(x.log_softmax(-1), u.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean(),
    ),
    "index": (
        lambda x, u: fastloss.cross_entropy(x.movedim(-1, 1), u.argmax(-1)),
        lambda x, u: F.cross_entropy(x.flatten(0, 1), u.argmax(-1).flatten()),
    ),
    "probabilities": (
        lambda x, u: fastloss.cross_entropy(x.movedim(-1, 1), u.softmax(-1).movedim(-1, 1)),
        lambda x, u: F.cross_entropy(x.flatten(0, 1), u.flatten(0, 1).softmax(-1)),
    ),
    "selected": (
        lambda x, u: fastloss.selective_log_softmax(x, u.argsort(-1)[..., :2]).square().sum(),
        lambda x, u: x.log_softmax(-1).gather(-1, u.argsort(-1)[..., :2]).square().sum(),
    ),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", STRIDED)
def test_compile_of_rows_at_two_strides(name: str, dynamic: bool) -> None:
    """Views of logits, and of a teacher's: no graph break, and no guess about their strides."""
    ours, textbook = STRIDED[name]
    compiled = torch.compile(
        lambda x, u: ours(x[:, :-1], u.transpose(0, 1)[:, 1:]), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for batch, time in ((2, 5), (3, 4)):
        x, u = logits(batch, time, V), logits(time, batch, V)
        results = []
        for dtype in torch.float32, torch.float64:
            leaf = x.to(dtype, copy=True).requires_grad_()
            views = leaf[:, :-1], u.to(dtype).transpose(0, 1)[:, 1:]
            value = compiled(leaf, u) if dtype == torch.float32 else textbook(*views)
            value.backward()
            results.append((value.detach().double(), leaf.grad.double()))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_compile_inductor_of_rows_at_two_strides() -> None:
    compiled = torch.compile(lambda x, u: fastloss.kl_div_with_logits(x[:, :-1], u[:, 1:]), fullgraph=True)
    x, u = logits(2, 5, V).requires_grad_(), logits(2, 5, V)
    loss = compiled(x, u)
    want = STRIDED["kl"][1](x[:, :-1].double(), u[:, 1:].double())
    torch.testing.assert_close(loss.double(), want)
    grads = [torch.autograd.grad(value, x)[0] for value in (loss, want)]
    torch.testing.assert_close(*grads)


def test_compile_our_options() -> None:
    weight, n = torch.rand(N), torch.tensor(4.0)
    kwargs = {"token_weight": weight, "normalizer": n, "logit_scale": 0.5, "softcap": 6.0, "z_loss": 1e-2}
    compiled = torch.compile(lambda x, y: fastloss.cross_entropy(x, y, **kwargs), fullgraph=True)
    x, y = logits(), classes()
    grads = []
    for fn in (compiled, lambda x, y: fastloss.cross_entropy(x, y, **kwargs)):
        leaf = x.clone().requires_grad_()
        fn(leaf, y).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_compile_a_training_step() -> None:
    """Model, autocast and module together; the loss is one operator of the graph, not a break in it."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, V))
    h, y = torch.randn(N, 8), classes()

    def step(loss: torch.nn.Module) -> Callable[[], list[Tensor]]:
        def run() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return loss(model(h), y)

        def grads() -> list[Tensor]:
            value = torch.compile(run, fullgraph=True)()
            return [value.detach(), *torch.autograd.grad(value, list(model.parameters()))]

        return grads

    ours, theirs = step(fastloss.CrossEntropyLoss())(), step(torch.nn.CrossEntropyLoss())()
    assert ours[0].dtype == theirs[0].dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=2e-3)


def test_compiled_func_grad() -> None:
    x, y = logits(), classes()
    compiled = torch.compile(lambda x: torch.func.grad(lambda t: fastloss.cross_entropy(t, y))(x), fullgraph=True)
    torch.testing.assert_close(compiled(x), torch.func.grad(lambda t: F.cross_entropy(t, y))(x))


class Head(torch.nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.loss = fastloss.CrossEntropyLoss(**kwargs)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(x * 2, y)


@pytest.mark.parametrize("strict", [False, True])
@options
def test_export(name: str, strict: bool) -> None:
    soft, kwargs = OPTIONS[name]
    batch = torch.export.Dim("batch")
    y = logits().softmax(-1) if soft else classes()
    program = torch.export.export(
        Head(**kwargs), (logits(), y), dynamic_shapes={"x": {0: batch}, "y": {0: batch}}, strict=strict
    )
    x, y = logits(11, V), logits(11, V).softmax(-1) if soft else classes(11)
    torch.testing.assert_close(program.module()(x, y), F.cross_entropy(x * 2, y, **kwargs))


@options
def test_fake_and_meta_tensors(name: str) -> None:
    soft, kwargs = OPTIONS[name]

    def shape_of(x: Tensor, y: Tensor, loss: Loss, weight: Tensor | None) -> tuple[Any, ...]:
        x = x.detach().requires_grad_()
        value = loss(x, y, **{**kwargs, "weight": weight})
        (grad,) = torch.autograd.grad(value.sum(), x)
        return value.shape, value.dtype, value.device, grad.shape, grad.dtype, type(value)

    x, y, w = logits(), logits().softmax(-1) if soft else classes(), kwargs.get("weight")
    for dtype in (torch.float32, torch.bfloat16):
        with FakeTensorMode() as mode:
            fake = [None if t is None else mode.from_tensor(t) for t in (x, y, w)]
            fake = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in fake]
            want = shape_of(fake[0], fake[1], F.cross_entropy, fake[2])
            assert shape_of(fake[0], fake[1], fastloss.cross_entropy, fake[2]) == want
        meta = [None if t is None else t.to("meta") for t in (x, y, w)]
        meta = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in meta]
        want = shape_of(meta[0], meta[1], F.cross_entropy, meta[2])
        assert shape_of(meta[0], meta[1], fastloss.cross_entropy, meta[2]) == want


@options
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(tracing_mode: str, name: str) -> None:
    soft, kwargs = OPTIONS[name]
    numbers = {k: v for k, v in kwargs.items() if k != "weight"}

    def step(x: Tensor, y: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        value = fastloss.cross_entropy(x, y, weight, **numbers)
        return value, torch.autograd.grad(value.sum(), x)[0]

    y, w = logits().softmax(-1) if soft else classes(), kwargs.get("weight")
    graph = make_fx(step, tracing_mode=tracing_mode)(logits(), y, w)
    assert any("fastloss" in str(node.target) for node in graph.graph.nodes)
    x, y = logits(), y.roll(1, 0)
    torch.testing.assert_close(graph(x, y, w), step(x, y, w))


def operator_calls() -> list[tuple[Any, tuple[Any, ...]]]:
    """(operator, arguments): index and probability targets with and without every option."""
    specs = (Spec(), Spec(3, 0.1, 1e-3, 5.0, 0.5))
    calls = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for soft in (False, True):
            for spec in specs:
                weight = None if spec is specs[0] else torch.rand(V)
                spec = spec._replace(ignore_index=-100, objective=Objective.PROBS) if soft else spec
                y = logits().softmax(-1) if soft else torch.randint(V, (N,))
                x = logits().to(dtype)
                for extras in (False, True):
                    calls.append((torch.ops.fastloss.row_loss.default, (x, y, weight, None, *spec, extras)))
                _, stats, *_ = torch.ops.fastloss.row_loss(x, y, weight, None, *spec, True)
                up = torch.rand(4, N, dtype=stats.dtype)
                for upstream in ([up[0], None, None, None], list(up)):
                    calls.append((torch.ops.fastloss.row_grad.default, (x, y, weight, None, *spec, stats, upstream)))
    return calls


def test_opcheck() -> None:
    calls = operator_calls()
    assert len(calls) == 48
    for op, args in calls:
        results = torch.library.opcheck(op, args)
        assert set(results.values()) == {"SUCCESS"}, results


# ---- listeners -----------------------------------------------------------------------------------------------------


class Named(Tensor):
    """A subclass that counts the functions it meets."""

    calls: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("which", [0, 1, 2])
def test_torch_function_of_subclasses(which: int) -> None:
    tensors = [logits(), classes(), torch.ones(V)]
    want = F.cross_entropy(*tensors)
    tensors[which] = tensors[which].as_subclass(Named)
    Named.calls.clear()
    got = fastloss.cross_entropy(*tensors)
    assert fastloss.cross_entropy in Named.calls
    torch.testing.assert_close(got.as_subclass(Tensor), want)


def test_subclass_gradients() -> None:
    x = logits().as_subclass(Named).requires_grad_()
    y = classes()
    fastloss.cross_entropy(x, y).backward()
    (want,) = torch.autograd.grad(F.cross_entropy(p := x.detach().as_subclass(Tensor).requires_grad_(), y), p)
    torch.testing.assert_close(x.grad.as_subclass(Tensor), want)


def test_parameters_are_plain_tensors() -> None:
    x, y = torch.nn.Parameter(logits()), classes()
    fastloss.cross_entropy(x, y).backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(F.cross_entropy(x, y), x)[0])


def test_torch_function_mode() -> None:
    seen = []

    class Mode(BaseTorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    x, y = logits(), classes()
    with Mode():
        got = fastloss.cross_entropy(x, y)
    assert fastloss.cross_entropy in seen
    torch.testing.assert_close(got, F.cross_entropy(x, y))


def test_dispatch_mode_sees_the_operators() -> None:
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x, y = logits().requires_grad_(), classes()
    with Mode():
        got = fastloss.cross_entropy(x, y)
        got.backward()
    assert {torch.ops.fastloss.row_loss.default, torch.ops.fastloss.row_grad.default} <= set(seen)
    torch.testing.assert_close(x.grad, torch.autograd.grad(F.cross_entropy(x, y), x)[0])


def test_default_device_and_dtype_do_not_leak_in() -> None:
    x, y = logits(), classes()
    want = fastloss.cross_entropy(x, y, normalizer=3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = fastloss.cross_entropy(x, y, normalizer=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want) and got.dtype == want.dtype and got.device == want.device
