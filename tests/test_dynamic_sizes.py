"""One export, and one compilation, for all sizes: batch, time, classes, features, and what targets list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dynamic_calls import CALLS, EXAMPLE, Call, Sizes
from torch import Tensor

import fastloss

pytestmark = pytest.mark.filterwarnings(
    # torch's compiler still uses what torch itself deprecates,
    "ignore:.class 'torch.autograd.function.Function'. should not be instantiated:DeprecationWarning",
    # and Dynamo reads the .grad of every input, also of those that are not leaves.
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)

# What an export must serve that was made of EXAMPLE, where no size is that of another.
OTHERS: dict[str, Sizes] = {
    "all_other": {"B": 4, "T": 7, "V": 19, "H": 5, "G": 6, "K": 3, "N": 9, "S": 10, "M": 12},
    "all_equal": {"B": 5, "T": 5, "V": 5, "H": 5, "G": 5, "K": 5, "N": 5, "S": 5, "M": 5},
    "as_many_tokens_as_classes": {"B": 6, "T": 17, "V": 17, "H": 3, "G": 4, "K": 4, "N": 17, "S": 9, "M": 6},
    "one_row": {"B": 1, "T": 4, "V": 9, "H": 3, "G": 4, "K": 4, "N": 1, "S": 9, "M": 2},
    "two_tokens": {"B": 3, "T": 2, "V": 9, "H": 3, "G": 4, "K": 4, "N": 2, "S": 9, "M": 2},
}
ROUNDING = {"rtol": 3e-5, "atol": 3e-6}


class Program(torch.nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        return self.call.ours(*tensors)


def assert_exact(call: Call, got: list[Tensor], inputs: list[Tensor], what: str) -> None:
    for a, b in zip(got, call.exact(*inputs), strict=True):
        b = b.to(a.dtype) if a.is_floating_point() else b
        torch.testing.assert_close(a, b, **ROUNDING, equal_nan=True, msg=lambda text: f"{what}: {text}")


def assert_exports(call: Call, generator: torch.Generator, strict: bool) -> None:
    sizes = {letter: torch.export.Dim(letter) for letter in EXAMPLE}
    dims = tuple({i: sizes[d] for i, d in enumerate(letters)} for letters in call.dims())
    inputs = tuple(call.inputs(EXAMPLE, generator))
    # Raises where a size becomes a constant of the program; a size that must not be another raises below.
    program = torch.export.export(Program(call), inputs, dynamic_shapes={"tensors": dims}, strict=strict)
    # torch 2.9 cannot check the guards of *tensors.
    module = program.module(check_guards=False) if torch.__version__.startswith("2.9.") else program.module()
    for name, other in OTHERS.items():
        tensors = call.inputs(other, generator)
        assert_exact(call, module(*tensors), tensors, name)


@pytest.mark.parametrize("name", CALLS)
def test_export_serves_all_sizes(name: str, generator: torch.Generator) -> None:
    assert_exports(CALLS[name], generator, False)


@pytest.mark.parametrize(
    "name", ["time_mean", "linear_cross_entropy_mean", "linear_js_mean", "linear_info_nce_mean", "packed_lm_none"]
)
def test_strict_export_serves_all_sizes(name: str, generator: torch.Generator) -> None:
    torch.compiler.reset()
    assert_exports(CALLS[name], generator, True)


def counting(backend: str = "aot_eager") -> tuple[Callable[..., Any], list[Any]]:
    """A backend of torch.compile, and the graphs that it was given."""
    graphs: list[Any] = []
    compiler = torch._dynamo.lookup_backend(backend)

    def compile_graph(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return compiler(graph, inputs)

    return compile_graph, graphs


LEARNED = ("input", "logits", "query", "key", "linear_weight", "linear_bias", "gate_logit")


def results(call: Call, f: Callable[..., list[Tensor]], tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What it returns, and the gradients of what is learned."""
    given = [
        t.to(dtype).requires_grad_(name in LEARNED) if t.is_floating_point() else t
        for name, t in zip(call.tensors, (t.clone() for t in tensors), strict=True)
    ]
    out = f(*given)
    sums = [0.7 * t.sum() for t in out if t.requires_grad]
    grads = torch.autograd.grad(torch.stack(sums).sum(), [t for t in given if t.requires_grad])
    return [t.detach().float() for t in (*out, *grads)]


def assert_compiles_twice(call: Call, generator: torch.Generator, backend: str = "aot_eager") -> None:
    """For the first size, and for all others."""
    torch.compiler.reset()
    counted, graphs = counting(backend)
    compiled = torch.compile(call.ours, fullgraph=True, backend=counted)
    for n in (5, 8, 11, 16, 23):
        tensors = call.inputs({**EXAMPLE, "T": 6, "M": 10, "B": n, "N": n}, generator)
        got = results(call, compiled, tensors, torch.float32)
        exact = results(call, call.exact, tensors, torch.float64)
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2


@pytest.mark.parametrize(
    "name", [n for n in CALLS if n.endswith("mean") or n == "row_stats" or "selective" in n or "linear_info" in n]
)
def test_one_compilation_serves_all_batches(name: str, generator: torch.Generator) -> None:
    assert_compiles_twice(CALLS[name], generator)


def test_inductor_takes_the_rows_of_a_chunk_from_the_batch(generator: torch.Generator) -> None:
    """Whose classes are the batch: how many rows have logits at once is computed when the program runs."""
    assert_compiles_twice(CALLS["linear_info_nce_mean"], generator, "inductor")


@pytest.mark.parametrize("numbers", [(4.5, 6.0, 7.5, 9.0), (4, 6, 7, 9)])
def test_one_compilation_serves_all_normalizers(numbers: tuple[float, ...]) -> None:
    torch.compiler.reset()
    counted, graphs = counting()
    x, y = torch.randn(6, 37), torch.randint(37, (6,))
    loss = torch.compile(lambda n: fastloss.cross_entropy(x, y, normalizer=n), fullgraph=True, backend=counted)
    for n in numbers:
        torch.testing.assert_close(loss(n), torch.nn.functional.cross_entropy(x, y, reduction="sum") / n)
    assert len(graphs) == 2


def test_normalizer_of_a_size() -> None:
    class Mean(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return fastloss.cross_entropy(x, y, normalizer=x.shape[0] * 2)

    n = torch.export.Dim("n")
    x, y = torch.randn(6, 5), torch.randint(5, (6,))
    program = torch.export.export(Mean(), (x, y), dynamic_shapes={"x": {0: n}, "y": {0: n}})
    x, y = torch.randn(9, 5), torch.randint(5, (9,))
    want = torch.nn.functional.cross_entropy(x, y) / 2
    torch.testing.assert_close(program.module()(x, y), want)


@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-3, "label_smoothing": 0.1}])
def test_two_losses_in_one_graph_of_all_sizes(options: dict[str, float]) -> None:
    """With dynamic=True every float is a graph input, which the second could not share."""
    torch.compiler.reset()

    class Losses(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.options = options

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return fastloss.cross_entropy(x, y, **self.options) + fastloss.cross_entropy(2 * x, y, **self.options)

    x, y = torch.randn(6, 37, requires_grad=True), torch.randint(37, (6,))
    compiled = torch.compile(Losses(), fullgraph=True, backend="aot_eager", dynamic=True)
    z = torch.cat([x, 2 * x])
    smoothing = options.get("label_smoothing", 0.0)
    want = torch.nn.functional.cross_entropy(z, y.repeat(2), label_smoothing=smoothing) * 2
    want = want + options.get("z_loss", 0.0) * (z.logsumexp(1) ** 2).mean() * 2
    got = compiled(x, y)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))
