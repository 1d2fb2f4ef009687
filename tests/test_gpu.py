"""A GPU is more than a fast CPU: streams, several devices, torch's compiler, assertions of kernels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import linear_calls
import pytest
import torch
import torch._inductor.config
from cases import CASES, LOSS_CASES
from check import judge, value_and_grad
from gpu_device import DEVICE, FAKE, synchronize
from on_gpu import here, in_own_process, keep_busy, side_stream, size, there
from torch import Tensor

import fastloss
from fastloss import arguments

if DEVICE is None:
    pytest.skip("torch sees no GPU", allow_module_level=True)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("one_thread"),
]
of_the_compiler = pytest.mark.filterwarnings(
    # It still uses what torch itself deprecates, and advises other matmuls.
    r"ignore::DeprecationWarning:torch\.",
    r"ignore::FutureWarning:torch\.",
    r"ignore::UserWarning:torch\.",
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning",
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",
    "ignore:.class 'torch.autograd.function.Function'. should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:TensorFloat32 tensor cores for float32:UserWarning",
)
BY_NAME = {case.name: case for case in (*CASES, *LOSS_CASES)}
BUSY = 400_000_000  # cycles: a few tenths of a second, in which a kernel that waits for nothing is long done


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ignored", "everything", "js", "topk_tail"])
def test_side_stream_while_the_default_one_is_busy(gpu_backend: str, name: str, generator: torch.Generator) -> None:
    """Every kernel goes to the caller's stream: one on the default stream would not have run when the result is read.
    What it would read and write there are numbers of the call before."""
    case, V = BY_NAME[name], size(50257, 301)
    for reduction in "mean", "none":
        given = [case.inputs(9, V, torch.bfloat16, generator) for _ in range(2)]
        if "normalizer" in given[0][2] and reduction == "none":
            continue
        upstream = case.upstream(9, generator) if reduction == "none" else None
        moved, g = there(given), there(upstream)
        with side_stream():
            for turn, (x, y, options) in enumerate(moved):
                synchronize()
                if turn:
                    on_default_stream(BUSY)
                got = here(value_and_grad(case.loss(), x, g, y, **options, reduction=reduction))
        x, y, options = given[1]
        judge(got, case.oracle, x, y, {**options, "reduction": reduction}, upstream)
        synchronize()


def on_default_stream(cycles: int) -> None:
    if not FAKE:
        with torch.cuda.stream(torch.cuda.default_stream(DEVICE)):
            keep_busy(cycles)


def test_side_stream_of_hidden_states(gpu_backend: str, generator: torch.Generator) -> None:
    for name in "ignored", "topk":
        calls = [linear_calls.Call(BY_NAME[name], 9, size(3000, 301), torch.bfloat16, generator) for _ in range(2)]
        for more in {}, {"reduction": "none"}:
            upstream = torch.rand(9, generator=generator) if more else None
            moved, g = there(calls), there(upstream)
            with side_stream():
                for turn, call in enumerate(moved):
                    synchronize()
                    if turn:
                        on_default_stream(BUSY)
                    got = here(linear_calls.results(call.ours, call.head, g, **more))
            linear_calls.assert_as_good_as_torch(calls[1], upstream, got, **more)
            synchronize()


def test_memory_that_streams_reuse(gpu_backend: str, generator: torch.Generator) -> None:
    """Forwards on a stream that lags behind, backwards from the default one, which then overwrites what was freed. The
    logits have no stride of one: what is copied inside is freed while kernels that read it still wait."""
    V = size(32000, 301)
    cases = [BY_NAME[name] for name in ("ignored", "forward_kl", "topk_ignored", "smoothing_weight")]
    given = [case.inputs(8, V, torch.float32, generator) for case in cases]
    moved = there([(x.t().contiguous(), y, options) for x, y, options in given])
    synchronize()
    for reduction in "mean", "none":
        results = []
        for case, (x, y, options) in zip(cases, moved, strict=True):
            with side_stream():
                keep_busy(BUSY // 20)
                leaf = x.detach().requires_grad_()
                loss = case.loss()(leaf.t(), y, **options, reduction=reduction)
                value = loss.detach().clone()
                overwrite(8, V)
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
            del loss, leaf
            overwrite(8, V)
            results.append((value, grad))
        synchronize()
        for case, (x, y, options), (value, grad) in zip(cases, given, results, strict=True):
            judge([value.cpu(), grad.t().cpu()], case.oracle, x, y, {**options, "reduction": reduction})


def overwrite(*shape: int) -> None:
    """What the current stream has of free memory."""
    held = [torch.full(shape, torch.nan, device=DEVICE) for _ in range(4)]
    del held


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_tensors_that_are_not_on_the_current_device(gpu_backend: str, generator: torch.Generator) -> None:
    if FAKE or torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    other = torch.device("cuda", (DEVICE.index + 1) % torch.cuda.device_count())
    with torch.cuda.device(other):
        for name in "ignored", "everything", "probabilities", "reverse_kl", "js", "topk_tail", "log_probs":
            case = BY_NAME[name]
            x, y, options = case.inputs(5, 3001, torch.bfloat16, generator)
            upstream = case.upstream(5, generator) if name == "log_probs" else None
            got = value_and_grad(case.loss(), there(x), there(upstream), there(y), **there(options))
            assert all(t.device == DEVICE for t in got)
            judge(here(got), case.oracle, x, y, options, upstream)
        for name in "ignored", "forward_kl", "topk":
            call = linear_calls.Call(BY_NAME[name], 9, 300, torch.bfloat16, generator)
            moved = there(call)
            for more in {}, {"reduction": "none"}:
                got = linear_calls.results(moved.ours, moved.head, None, **more)
                linear_calls.assert_as_good_as_torch(call, None, here(got), **more)
        assert torch.cuda.current_device() == other.index


# ---- torch's compiler ------------------------------------------------------------------------------------------------


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As many compiling processes as cores, beside each worker of these tests, are too many."""
    # torch before 2.12 cannot be asked about the fake device's autocast while it compiles.
    monkeypatch.setattr(arguments, "_KNOWN_DEVICES", arguments._KNOWN_DEVICES | {DEVICE.type})
    with torch._inductor.config.patch(compile_threads=1):
        yield


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager" if FAKE else "inductor")


@of_the_compiler
@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(gpu_backend: str, reduction: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """In one graph, between other operations of it."""
    for name in ("ignored", "js") if dtype == torch.bfloat16 else ("smoothing_weight", "topk_tail"):
        case = BY_NAME[name]
        x, y, options = case.inputs(6, size(3001, 301), dtype, generator)
        options["reduction"] = reduction
        upstream = case.upstream(6, generator) if reduction == "none" else None
        moved, loss = there(options), case.loss()
        run = compiled(lambda x, y, loss=loss, moved=moved: loss(x * 2, y, **moved) * 2)
        got = here(value_and_grad(run, there(x), there(upstream), there(y)))
        judge(got, lambda x, y, case=case, **more: case.oracle(x * 2, y, **more) * 2, x, y, options, upstream)


@of_the_compiler
@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("more", [{}, {"reduction": "none"}], ids=["mean", "none"])
def test_compiled_hidden_states(
    gpu_backend: str, more: dict[str, Any], dtype: torch.dtype, generator: torch.Generator
) -> None:
    for name in ("ignored", "js") if dtype == torch.bfloat16 else ("topk",):
        call = linear_calls.Call(BY_NAME[name], 9, 301, dtype, generator)
        upstream = torch.rand(9, generator=generator) if more else None
        moved = there(call)
        run = compiled(lambda *head, moved=moved: moved.ours(*head, **more))
        got = here(linear_calls.results(run, moved.head, there(upstream)))
        linear_calls.assert_as_good_as_torch(call, upstream, got, **more)


# ---- class indices out of range --------------------------------------------------------------------------------------

V = 500
BAD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda x, y: fastloss.cross_entropy(x, y),
    "none": lambda x, y: fastloss.cross_entropy(x, y, reduction="none"),
    "statistics": lambda x, y: fastloss.cross_entropy(x, y, return_stats=True)[1].lse,
    "topk": lambda x, y: fastloss.topk_cross_entropy(x, y[:, None], torch.ones_like(x[:, :1])),
    "log_probs": lambda x, y: fastloss.selective_log_softmax(x, y),
    "linear": lambda x, y: fastloss.linear_cross_entropy(x[:, :32], x.t()[:, :2].repeat(1, 16), y),
    "linear none": lambda x, y: fastloss.linear_cross_entropy(
        x[:, :32], x.t()[:, :2].repeat(1, 16), y, reduction="none"
    ),
}


def of_bad_labels(name: str, bad: int) -> str:
    """What came of it, in a process that is lost."""
    x = torch.randn(3, V).bfloat16()
    x, y = there(x), there(torch.tensor([0, bad, 1]))
    try:
        with torch.set_grad_enabled(name != "statistics"):
            value = BAD[name](x.requires_grad_(), y)
            synchronize()
            return f"the value {value.detach().cpu()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", BAD)
def test_bad_labels_trip_an_assertion(gpu_backend: str, name: str) -> None:
    bad = (V, -1, 2**40)[list(BAD).index(name) % 3]
    said = in_own_process(gpu_backend, of_bad_labels, name, bad)
    assert re.search("device-side assert|device assertion failed", said)  # of CUDA, of an emulator
