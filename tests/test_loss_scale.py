"""A loss scale and 16-bit gradients of hidden states and heads: it comes before they are rounded, whether the forward
expected it or the backward makes them again."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import to
from engines import ONE_OF_EACH, on_engine
from linear_calls import ALL_CASES, Call
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastloss
from fastloss import backends
from fastloss.linear import heads, upstream

N, V = 4096, 65
OTHERWISE = 1.15
SCALES = {torch.float16: 65536.0, torch.bfloat16: 1 / 3}
WHOLE = {"max_chunk_bytes": 16 << 20}  # the weight's gradient in one piece; the cases' own memory is for blocks of it
BY_NAME = {case.name: case for case in ALL_CASES}
# One of each objective, and what else changes the path.
NAMES = ["index", "ignored", "token_weight", "probabilities", "topk", "topk_kl_tail", "forward_kl", "reverse_kl", "js"]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch._dynamo's own
]
dtypes = pytest.mark.parametrize("dtype", SCALES, ids=str)
names = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def device_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for tensors whose numbers would have to be waited for."""
    monkeypatch.setattr(upstream, "on_host", lambda _: False)


def call_of(case: Any, dtype: torch.dtype, rows: int = N, g: torch.Generator | None = None) -> Call:
    call = Call(case, rows, V, dtype, torch.Generator().manual_seed(5) if g is None else g)
    if "normalizer" in call.options:
        call.options["normalizer"] = float(rows)  # or the largest gradients are no float16
    return call


def gradients(loss: Callable[..., Tensor], call: Call, scale: float | Tensor, **more: Any) -> list[Tensor]:
    """Of a loss in float32, as under autocast, times a scale."""
    if call.case.function != "selective_log_softmax":
        more["out_dtype"] = torch.float32
    leaves = [t.detach().clone().requires_grad_() for t in call.head]
    value = loss(*leaves, **more)
    (value * scale).sum().backward()
    return [t.grad for t in leaves]


def judged(call: Call, got: list[Tensor], scale: float | Tensor, slack: float = 1.0, **more: Any) -> None:
    """Errors no larger than those of 16-bit logits whose loss torch makes in float32, and zeros where those of float64
    round to zero. `slack`: of engines whose logits are as rounded as torch's, but otherwise."""

    def textbook(dtype: torch.dtype, wide: torch.dtype) -> list[Tensor]:
        leaves = [to(t, dtype).detach().clone().requires_grad_() for t in call.head]
        target = call.target
        target = F.linear(*(to(t, dtype) for t in target)).to(wide) if isinstance(target, list) else to(target, wide)
        options = {name: to(value, wide) for name, value in call.options.items()}
        value = call.case.oracle(F.linear(*leaves).to(wide), target, **options, **more)
        (value * to(scale, wide)).sum().backward()
        return [t.grad for t in leaves]

    dtype = call.head[0].dtype
    same, exact = textbook(dtype, torch.float32), textbook(torch.float64, torch.float64)
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for name, a, b, t in zip(("hidden", "weight", "bias"), got, same, exact, strict=True):
        found, allowed = (((x.double() - t).norm() / t.norm()).item() for x in (a, b))
        assert found <= allowed * slack + 2e-5, f"{call.case.name} {name}: {found:.2e}, torch {allowed:.2e}"
        assert not ((a == 0) & (t.abs() > 2 * least)).any(), f"{call.case.name} {name}: zeros"


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@dtypes
@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_errors(case: Any, dtype: torch.dtype) -> None:
    """Made again, guessed, and by rows; of heads in one piece and by blocks."""
    call, scale = call_of(case, dtype), SCALES[dtype]
    if case.function == "selective_log_softmax":
        scale = scale / N * case.upstream(N, torch.Generator().manual_seed(3))
        judged(call, gradients(call.ours, call, scale), scale)
        return
    for limit in {}, WHOLE:
        upstream._of_host.clear()
        again, guessed = (gradients(call.ours, call, scale, reduction="mean", **limit) for _ in range(2))
        assert same(again, guessed)
        judged(call, guessed, scale, reduction="mean")
    if "normalizer" not in call.options:
        of_rows = scale / N * torch.rand(N)
        judged(call, gradients(call.ours, call, of_rows, reduction="none"), of_rows, reduction="none")


@dtypes
@names
@pytest.mark.parametrize("engine", ONE_OF_EACH[1:])
def test_errors_of_other_engines(engine: str, name: str, dtype: torch.dtype) -> None:
    """Also of those that keep logits in 16 bits, whose gradients a loss scale must reach as well."""
    call = call_of(BY_NAME[name], dtype, 512 if engine == "cuda:host" else N)
    with on_engine(engine):
        again, guessed = (gradients(call.ours, call, SCALES[dtype], **WHOLE) for _ in range(2))
    assert same(again, guessed)
    judged(call, guessed, SCALES[dtype], OTHERWISE)


@pytest.mark.parametrize(("rows", "features", "classes"), [(4096, 64, 8192), (16384, 32, 512)])
def test_long_batches_of_float16(rows: int, features: int, classes: int) -> None:
    """Of gradients for one, 0.1 and 0.3 % round to zero, and the error is 2 and 7 times torch's."""
    call = call_of(BY_NAME["index"], torch.float16, 8)
    call.target = torch.randint(classes, (rows,))
    sizes = ((rows, features), (classes, features), (classes,))
    call.head = [(torch.randn(s) * k).half() for s, k in zip(sizes, (1, 0.2, 0.1), strict=True)]
    judged(call, gradients(call.ours, call, 65536.0, max_chunk_bytes=heads.MAX_CHUNK_BYTES), 65536.0)


CHANGES = [1.0, 65536.0, 65536.0, 32768.0, 0.0, 1 / 3, 1 / 3, -2.0, 1.0]


@dtypes
@names
def test_scales_that_change(name: str, dtype: torch.dtype) -> None:
    """No bit depends on what was expected; and a second backward gives the same again."""
    call = call_of(BY_NAME[name], dtype, 96)
    for limit in {}, WHOLE:
        want = {}
        for scale in CHANGES:
            upstream._of_host.clear()
            want[scale] = gradients(call.ours, call, scale, **limit)
        assert not same(want[1.0], want[1 / 3])
        for scale in CHANGES:
            assert same(gradients(call.ours, call, scale, **limit), want[scale]), scale
        leaves = [t.clone().requires_grad_() for t in call.head]
        loss = call.ours(*leaves, out_dtype=torch.float32, **limit)
        for scale in CHANGES:
            found = torch.autograd.grad(loss, leaves, torch.tensor(scale), retain_graph=True)
            assert same(list(found), want[scale]), scale


def test_overflow_is_seen_and_forgotten() -> None:
    """What a GradScaler looks for; the next step expects nothing of it."""
    for dtype in SCALES:
        call = call_of(BY_NAME["ignored"], dtype, 96)
        want, ignored = gradients(call.ours, call, 2.0), call.target == -100
        for scale in torch.inf, torch.nan:
            hidden, weight, bias = gradients(call.ours, call, scale)
            assert not hidden[~ignored].isfinite().any() and not weight.isfinite().any() and not bias.isfinite().any()
            assert (hidden[ignored] == 0).all()
            assert upstream._of_host == {fastloss.spec.Objective.INDEX: 2.0}
        assert same(gradients(call.ours, call, 2.0), want)


def test_what_a_wrong_guess_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and the gradient of hidden states once more; nothing where nothing is rounded before the backward."""
    products, choose = 0, backends.choose_for

    def counting(*request: Any) -> backends.Backend:
        backend = choose(*request)

        def matmul(*args: Any) -> None:
            nonlocal products
            products += 1
            backend.matmul(*args)

        return backend._replace(matmul=matmul)

    def cost(call: Call, scale: float) -> int:
        nonlocal products
        products = 0
        gradients(call.ours, call, scale, **WHOLE)
        return products

    monkeypatch.setattr(heads, "choose_for", counting)
    scales = (1.0, 8.0, 8.0, 4.0)
    assert [cost(call_of(BY_NAME["index"], torch.bfloat16, 96), s) for s in scales] == [3, 5, 3, 5]
    assert [cost(call_of(BY_NAME["index"], torch.float32, 96), s) for s in scales] == [3, 3, 3, 3]
    kl = call_of(BY_NAME["forward_kl"], torch.bfloat16, 96)
    assert [cost(kl, s) for s in (1.0, 1.0)] == [4, 4], "an objective does not disturb another's guess"
    assert cost(call_of(BY_NAME["index"], torch.bfloat16, 96), 4.0) == 3


@dtypes
@names
@pytest.mark.parametrize("engine", ONE_OF_EACH)
def test_devices_wait_for_nothing(engine: str, name: str, dtype: torch.dtype, device_guess: None) -> None:
    """From the second step with a scale on it is as if it had been known; the first rounds twice."""
    call = call_of(BY_NAME[name], dtype, 96)
    with on_engine(engine):
        for limit in {}, WHOLE:
            for scale in 1.0, 65536.0, 1 / 3:
                first, second, third = (gradients(call.ours, call, scale, **limit) for _ in range(3))
                assert same(second, third)
                if limit or engine == "cpu":  # a library rounds what each chunk contributes
                    judged(call, second, scale, 1.0 if engine == "cpu" else OTHERWISE)
                for a, b in zip(first, second, strict=True):
                    assert (a.double() - b).norm() < 2 * torch.finfo(dtype).eps * b.double().norm()
            for lost in torch.inf, torch.nan, 0.0:
                gradients(call.ours, call, lost, **limit)
            assert same(gradients(call.ours, call, scale, **limit), third), "the guess is of steps that count"
            leaves = [t.clone().requires_grad_() for t in call.head]
            loss = call.ours(*leaves, out_dtype=torch.float32, **limit)
            for again in scale, 0.0, 1.0, scale:
                found = torch.autograd.grad(loss, leaves, torch.tensor(again), retain_graph=True)
                assert again != 0 or not any(g.any() for g in found)
            assert same(list(found), third)


def test_devices_are_as_good_as_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, scale in SCALES.items():
        call = call_of(BY_NAME["index"], dtype, 96)
        want = gradients(call.ours, call, scale)
        with monkeypatch.context() as m:
            m.setattr(upstream, "on_host", lambda _: False)
            first, second = (gradients(call.ours, call, scale) for _ in range(2))
        assert same(second, want) and same(first[2:], want[2:])


def test_a_guess_that_a_graph_captured_is_not_kept(device_guess: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first replay a CUDA graph's memory holds anything: a step outside it must not read the guess there."""
    call = call_of(BY_NAME["index"], torch.bfloat16, 96)
    with monkeypatch.context() as capturing:
        capturing.setattr(upstream, "captures", lambda device: True)
        gradients(call.ours, call, 1024.0)
        assert not upstream._of_device
    gradients(call.ours, call, 1024.0)
    assert float(*upstream._of_device.values()) == 1024


def test_threads() -> None:
    """Several at once, each with a scale of its own: a guess of one is wrong for another, and harmless."""
    calls = [call_of(BY_NAME[name], torch.bfloat16, 96) for name in ("index", "topk", "forward_kl")]

    def run(i: int) -> list[Tensor]:
        call = calls[i % 3]
        return gradients(call.ours, call, 1.0 + 0.3 * (i % 4))

    want = [run(i) for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(4):
            assert all(same(got, w) for got, w in zip(pool.map(run, range(12)), want, strict=True))


def compiled(call: Call, graphs: list[Any], **more: Any) -> Callable[..., Tensor]:
    """In one graph, which is counted."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    return torch.compile(lambda *t: call.ours(*t, out_dtype=torch.float32, **more), fullgraph=True, backend=backend)


@dtypes
@names
def test_compiled(name: str, dtype: torch.dtype) -> None:
    """One graph for all scales, and the bits of the eager loss."""
    call = call_of(BY_NAME[name], dtype, 96)
    for limit in {}, WHOLE:
        torch._dynamo.reset()
        graphs: list[Any] = []
        loss = compiled(call, graphs, **limit)
        for scale in CHANGES:
            leaves = [t.clone().requires_grad_() for t in call.head]
            value = loss(*leaves)
            got = torch.autograd.grad(value, leaves, torch.tensor(scale))
            assert same(list(got), gradients(call.ours, call, scale, **limit)), scale
        assert len(graphs) == 2, "forward and backward"


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiled_scales_of_devices(backend: str, device_guess: None) -> None:
    torch._dynamo.reset()
    call = call_of(BY_NAME["index"], torch.float16, 96)
    loss = torch.compile(call.ours, fullgraph=True, backend=backend)
    for scale in 65536.0, 1 / 3:
        got = [gradients(loss, call, scale) for _ in range(3)]
        assert same(got[1], got[2])
        judged(call, got[2], scale)


def test_exported() -> None:
    """A module whose weight wants a gradient: the operator in the program makes what nobody asks for."""
    module = fastloss.LinearCrossEntropyLoss(33, V).bfloat16()
    hidden, y = torch.randn(12, 33).bfloat16(), torch.arange(12)
    program = torch.export.export(module, (hidden, y)).module()
    with torch.no_grad():
        assert torch.equal(program(hidden, y), module(hidden, y))


def test_second_backward_and_double_backward_of_a_graph() -> None:
    call = call_of(BY_NAME["index"], torch.bfloat16, 96)
    torch._dynamo.reset()
    loss = torch.compile(call.ours, fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in call.head]
    value = loss(*leaves, out_dtype=torch.float32)
    scales = 1.0, 3.0, 3.0, 1.0
    found = [torch.autograd.grad(value, leaves, torch.tensor(s), retain_graph=True) for s in scales]
    for scale, got in zip(scales, found, strict=True):
        assert same(list(got), gradients(call.ours, call, scale))
    assert all(a.data_ptr() != b.data_ptr() for one, other in pairwise(found) for a, b in zip(one, other, strict=True))
    value = call.ours(*leaves, out_dtype=torch.float32)
    penalty = torch.autograd.grad(value, leaves, torch.tensor(3.0), create_graph=True)
    torch.testing.assert_close([g.detach() for g in penalty], gradients(call.ours, call, 3.0), rtol=0.02, atol=2e-3)


@dtypes
def test_checkpointing(dtype: torch.dtype) -> None:
    """The loss comes by rows, and its gradients when their scale is known."""
    call = call_of(BY_NAME["index"], dtype)
    got = gradients(lambda *t, **k: checkpoint(call.ours, *t, use_reentrant=False, **k), call, SCALES[dtype])
    judged(call, got, SCALES[dtype])


@dtypes
@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce(symmetric: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    pairs = [torch.randn(1024, 16, generator=g).to(dtype) for _ in range(2)]
    scale = SCALES[dtype]

    def grads(loss: Callable[..., Tensor], dtype: torch.dtype, **more: Any) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in pairs]
        (loss(*leaves, symmetric=symmetric, **more) * scale).backward()
        return [t.grad for t in leaves]

    again, guessed = (grads(fastloss.linear_info_nce, dtype, out_dtype=torch.float32) for _ in range(2))
    assert same(again, guessed)
    exact, torchs = grads(fastloss.info_nce, torch.float64), grads(fastloss.info_nce, dtype, out_dtype=torch.float32)
    for a, b, t in zip(guessed, torchs, exact, strict=True):
        found, allowed = (((x.double() - t).norm() / t.norm()).item() for x in (a, b))
        assert found <= allowed + 1e-4


@dtypes
def test_shards(dtype: torch.dtype) -> None:
    """A vocabulary of one rank: what all ranks do with theirs."""
    for name in NAMES:
        call = call_of(BY_NAME[name], dtype)
        shard = fastloss.VocabShard(0, V, V)
        judged(call, gradients(call.ours, call, SCALES[dtype], shard=shard), SCALES[dtype])


def test_operators_are_torchs() -> None:
    """opcheck: schema, fake tensors, dynamic shapes."""
    from fastloss.linear import rows
    from fastloss.spec import Rows, make_spec

    call = call_of(BY_NAME["index"], torch.bfloat16, 16)
    of = heads.Head(*call.head)
    for block_bytes in 1 << 10, 1 << 20:
        given = heads.LinearRows(Rows(heads.stand_in(of), call.target, None, make_spec()), of, None, 5, block_bytes)
        for needs in [True, True, True], [False, True, False]:
            args = *rows.flat(given), None, torch.tensor(3.0), needs
            for more in (), (torch.tensor(2.0),):
                torch.library.opcheck(torch.ops.fastloss.linear_loss, (*args, *more), test_utils=OPCHECKS)
            _, *made = torch.ops.fastloss.linear_loss(*args)
            for scale in 1.0, 3.0:
                call_args = *args, made, torch.tensor(scale)
                torch.library.opcheck(torch.ops.fastloss.linear_loss_grad, call_args, test_utils=OPCHECKS)


OPCHECKS = ("test_schema", "test_faketensor")
