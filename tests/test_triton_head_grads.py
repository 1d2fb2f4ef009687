"""The gradient of logits that Triton never writes, and products that leave out its small tiles: executed as PTX, and
compiled for what they are meant for."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from cuda_engine import cuda_on_host
from test_triton_heads import OPTIONS, head, log, multiplied  # noqa: F401 - a fixture
from triton_engine import TARGETS, assert_multiplies_well, in_shapes, launches, taking_turns

import fastloss
from fastloss.backends import device
from fastloss.backends import triton as backend
from fastloss.linear import chunks
from fastloss.linear.heads import Head, stand_in
from fastloss.spec import Rows, make_spec

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install triton"),
    pytest.mark.usefixtures("one_thread"),
]
EPS = 2.0**-12


def gradients(given: list[torch.Tensor], loss: Any, upstream: Any) -> tuple[torch.Tensor, ...]:
    inputs = [t.detach().requires_grad_() for t in given]
    outputs = loss(*inputs)
    return torch.autograd.grad(outputs, inputs, [u.to(y.dtype) for u, y in zip(upstream, outputs, strict=True)])


def check(N: int, V: int, H: int, dtype: torch.dtype, g: torch.Generator, reduction: str, **options: Any) -> None:
    """Gradients of hidden states, weight and bias: no further from float64's than those of torch's logits."""
    given, y = head(N, V, H, dtype, g)
    weight = torch.rand(V, generator=g).to(dtype) if options.pop("weight", False) else None
    given = given if options.pop("linear_bias", False) else given[:2]
    stats = options.pop("return_stats", False)
    ours = {k: options.pop(k) for k in ("filter_eps", "max_chunk_bytes") if k in options}
    shape = (N,) if reduction == "none" else ()
    upstream = [torch.rand(s, generator=g) for s in ((shape, (N,), (N,), (N,)) if stats else (shape,))]

    def loss(hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        out = fastloss.linear_cross_entropy(
            hidden, head, y, linear_bias=bias, weight=weight, reduction=reduction, return_stats=stats,
            out_dtype=torch.float32, **ours, **options,
        )  # fmt: skip
        return (out[0], out[1].lse, out[1].log_prob, out[1].entropy) if stats else (out,)

    def plain(*head: torch.Tensor) -> tuple[torch.Tensor, ...]:
        w = None if weight is None else weight.to(head[0].dtype)
        with fastloss.use_backend("reference"):
            out = fastloss.cross_entropy(
                F.linear(*head), y, weight=w, reduction=reduction, return_stats=stats, **options
            )
        return (out[0], out[1].lse, out[1].log_prob, out[1].entropy) if stats else (out,)

    found, exact = gradients(given, loss, upstream), gradients([t.double() for t in given], plain, upstream)
    for ours_, theirs, want in zip(found, gradients(given, plain, upstream), exact, strict=True):
        error, allowed = ((t.double() - want).norm() / want.norm() for t in (ours_, theirs))
        assert error <= 1.05 * allowed + torch.finfo(dtype).eps / 4


@pytest.mark.parametrize("filter_eps", [None, 1e-7])
@pytest.mark.parametrize("options", OPTIONS)
def test_executed(log, options, filter_eps, generator):  # noqa: F811
    """Rows, classes and depths that fill no tile. Dtypes and reductions take turns."""
    turn = list(OPTIONS).index(options) + (filter_eps is not None)
    reduction = "none" if filter_eps is None else ("mean", "sum")[turn // 2 % 2]
    dtype = (torch.bfloat16, torch.float16)[turn % 2]
    check(5, 300, 40, dtype, generator, reduction, filter_eps=filter_eps, **OPTIONS[options])
    ran = {launch.kernel.split("(")[0] for launch in log}
    assert {"head_states", "head_grad"} <= ran and ("kept_product" in ran) == (filter_eps is not None)


@pytest.mark.parametrize("options", ["bias", "softcap"])
def test_in_another_shape(log, options, generator):  # noqa: F811
    with in_shapes(taking_turns(1)):
        check(66, 130, 40, torch.bfloat16, generator, "mean", filter_eps=1e-7, **OPTIONS[options])


@pytest.mark.parametrize("filter_eps", [0.0, 1e-7])
def test_upstream_of_everything(log, filter_eps, generator):  # noqa: F811
    """Losses, lse, log-probabilities and entropies at once; of ignored rows upstream gradients that mean nothing."""
    check(4, 150, 24, torch.bfloat16, generator, "none", return_stats=True, filter_eps=filter_eps, **OPTIONS["bias"])
    options = {**OPTIONS["softcap"], "label_smoothing": 0.1}
    check(4, 150, 24, torch.float16, generator, "mean", return_stats=True, filter_eps=filter_eps, **options)


def test_unaligned_and_in_chunks(log, generator):  # noqa: F811
    """Of no 16-byte access; three chunks, whose weights' gradients add up; more rows than a tile has."""
    check(20, 131, 37, torch.bfloat16, generator, "mean", filter_eps=1e-7, max_chunk_bytes=131 * 4 * 8)
    check(70, 33, 70, torch.float16, generator, "sum", filter_eps=1e-7, **OPTIONS["smoothing"])


def peaked(N: int, V: int, H: int, dtype: torch.dtype, g: torch.Generator) -> tuple[Rows, Head, torch.Tensor]:
    """Rows whose probability is nearly all with classes of the first and the third of three tiles; and their logits."""
    (hidden, weight, bias), y = head(N, V, H, dtype, g)
    bias[128:256] -= 40
    made = Head(hidden, weight, bias)
    y[:] = y % 128
    y[::3] = V - 1 - y[::3] % 100
    y[1] = -100
    rows = Rows(stand_in(made), y, None, make_spec())
    return rows, made, F.linear(hidden.double(), weight.double(), bias.double())


def made_of(rows: Rows, given: Head, filter_eps: float | None, upstream: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """What head_grad writes and says of it."""
    kernels = backend.kernels()
    _, stats, *_ = device.head_loss(kernels, rows, *given, False)
    grad = torch.full(rows.input.shape, torch.nan, dtype=given.dtype())
    tiles = device.head_grad(kernels, rows, *given, stats, [upstream, None, None, None], grad, filter_eps)
    return grad, tiles


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_logits(log, dtype, generator):  # noqa: F811
    """Every entry, once; with filtering off by less than filter_eps times upstream, and zero in a tile left out."""
    rows, given, logits = peaked(6, 380, 32, dtype, generator)
    upstream = torch.rand(6, generator=generator) + 0.5
    exact, tiles = made_of(rows, given, None, upstream)
    assert tiles is None and log[-1].store_bytes == exact.numel() * 2
    logits.requires_grad_()
    F.cross_entropy(logits, rows.target, reduction="none").backward(upstream.double())
    torch.testing.assert_close(exact.double(), logits.grad, rtol=torch.finfo(dtype).eps, atol=1e-7)

    filtered, tiles = made_of(rows, given, EPS, upstream)
    assert tiles.kept.tolist() == [[1, 0, 1]] and log[-1].store_bytes == exact.numel() * 2 + 3
    assert torch.equal(filtered[:, :128], exact[:, :128]) and torch.equal(filtered[:, 256:], exact[:, 256:])
    assert not filtered[:, 128:256].any()
    assert ((filtered - logits.grad).abs() < EPS * upstream[:, None] + exact.abs() * torch.finfo(dtype).eps).all()


def test_products_never_read_what_is_left_out(log, generator):  # noqa: F811
    """Of tiles that are not kept, NaN; every combination of a product and its sum."""
    grad = torch.randn(150, 300, generator=generator).bfloat16()
    hidden, weight = (torch.randn(n, 40, generator=generator).bfloat16() for n in (150, 300))
    kept = torch.tensor([[1, 0, 0], [0, 0, 1]], dtype=torch.int8)
    tiles = device.Tiles(kept, (128, 128), backend.kernels().kept_product)
    wide = kept.repeat_interleave(128, 0)[:150].repeat_interleave(128, 1)[:, :300] == 1
    holes, clean = grad.masked_fill(~wide, torch.nan), grad.masked_fill(~wide, 0).float()
    d_hidden, d_weight = torch.full((150, 40), torch.nan), torch.ones(300, 40)
    tiles.matmul(holes, weight, d_hidden)
    tiles.t().matmul(holes.t(), hidden, d_weight, True)
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(d_hidden, clean @ weight.float(), **close)
    torch.testing.assert_close(d_weight, 1 + clean.t() @ hidden.float(), **close)
    assert log[-1].store_bytes == (128 + 44) * 40 * 4, "classes of which nothing is kept are not touched"
    tiles.t().matmul(holes.t(), hidden, d_weight)
    torch.testing.assert_close(d_weight, clean.t() @ hidden.float(), **close)


@pytest.mark.parametrize("weighted", [False, True])
def test_ignored_rows_are_in_no_product(log, weighted, generator):  # noqa: F811
    """With a filter_eps of 0 on a device, where nobody knows how many they are: forward and backward as many operations
    of tensor cores as for the rows that count, of a gradient that is exact."""
    (hidden, weight, _), y = head(140, 130, 32, torch.bfloat16, generator)
    y[torch.randperm(140, generator=generator)[:80]] = -100
    token_weight = torch.where(torch.arange(140) % 7 == 0, 0.0, 0.5) if weighted else None
    counts = y != -100 if token_weight is None else (y != -100) & (token_weight != 0)
    clean = hidden.clone()
    hidden[~counts] = torch.nan

    def run(where: slice | torch.Tensor) -> list[torch.Tensor]:
        log.clear()
        inputs = [hidden[where].clone().requires_grad_(), weight.clone().requires_grad_()]
        mine = None if token_weight is None else token_weight[where]
        loss = fastloss.linear_cross_entropy(*inputs, y[where], token_weight=mine, filter_eps=0.0)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    with patch.object(chunks, "may_wait_for", lambda device: False):  # as it is there
        loss, *found = run(slice(None))
        taken = multiplied(log)
        alone, *of_some = run(counts)
    assert 0 < taken == multiplied(log)
    torch.testing.assert_close(loss, alone)
    assert not found[0][~counts].any()
    torch.testing.assert_close([found[0][counts], found[1]], of_some, rtol=1e-2, atol=1e-5)
    exact = [t.double().requires_grad_() for t in (clean, weight)]
    losses = F.cross_entropy(F.linear(*exact), y, reduction="none")
    weights = counts.double() if token_weight is None else token_weight.double() * counts
    ((losses * weights).sum() / weights.sum()).backward()
    for ours, want in zip(found, exact, strict=True):
        assert (ours.double() - want.grad).norm() < 5e-3 * want.grad.norm()


def test_rows_that_no_one_reads_are_in_no_product(log, generator):  # noqa: F811
    """Of statistics, too: backward as many operations of tensor cores as for the rows that have upstream gradients,
    forward as for those that are not ignored. The others hold NaN."""
    (hidden, weight, _), y = head(140, 130, 32, torch.bfloat16, generator)
    order = torch.randperm(140, generator=generator)
    y[y == -100] = 0
    y[order[:80]] = -100
    upstream, read, clean = torch.zeros(3, 140), order[100:], hidden.clone()
    upstream[:, read] = torch.rand(3, 40, generator=generator) + 0.1
    hidden[order[:100]] = torch.nan

    def run(where: torch.Tensor) -> tuple[list[torch.Tensor], int, int]:
        inputs = [hidden[where].clone().requires_grad_(), weight.clone().requires_grad_()]
        _, stats = fastloss.linear_cross_entropy(*inputs, y[where], filter_eps=0.0, return_stats=True)
        forward = multiplied(log)
        log.clear()
        grads = torch.autograd.grad(stats[:3], inputs, list(upstream[:, where]))
        backward = multiplied(log)
        log.clear()
        return [torch.stack(stats[:3]).detach(), *grads], forward, backward

    with patch.object(chunks, "may_wait_for", lambda device: False):
        (stats, *found), forward, backward = run(torch.arange(140))
        (alone, *of_some), _, of_read = run(read)
        _, of_counted, _ = run(order[80:])
    assert 0 < forward == of_counted and 0 < backward == of_read
    assert not stats[:, order[:80]].any() and not found[0][order[:100]].any()
    torch.testing.assert_close(stats[:, read], alone)
    torch.testing.assert_close([found[0][read], found[1]], of_some, rtol=1e-2, atol=1e-4)
    exact = [t.double().requires_grad_() for t in (clean[read], weight)]
    z = F.linear(*exact)
    log_p = z.log_softmax(1)
    want = z.logsumexp(1), log_p.gather(1, y[read][:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    grads = torch.autograd.grad(want, exact, list(upstream[:, read].double()))
    for ours, truth in zip((found[0][read], found[1]), grads, strict=True):
        assert (ours.double() - truth).norm() < 5e-3 * truth.norm()


def test_rows_that_do_not_count(log, generator):  # noqa: F811
    """Whatever they hold: a tile of them costs nothing."""
    rows, given, _ = peaked(140, 130, 16, torch.float16, generator)
    rows.target[:128] = -100
    given.hidden[:128] = torch.nan
    grad, tiles = made_of(rows, given, 1e-7, torch.ones(140))
    assert tiles.kept.tolist() == [[0, 0], [1, 0]] and not grad[:128].any() and grad[128:].any()
    rows.target[:] = -100
    assert not made_of(rows, given, None, torch.ones(140))[0].any()


def test_a_bad_row_is_not_hidden(log, generator):  # noqa: F811
    rows, given, _ = peaked(3, 60, 16, torch.bfloat16, generator)
    given.hidden[2, 0] = torch.nan
    grad, tiles = made_of(rows, given, 0.5, torch.ones(3))
    assert grad[2].isnan().all() and not grad[:2].isnan().any() and tiles.kept.item() == 1


def test_from_the_public_functions(log, generator):  # noqa: F811
    """The module, and what explain says of it."""
    (hidden, weight, _), y = head(6, 140, 32, torch.bfloat16, generator)
    layer = fastloss.LinearCrossEntropyLoss(32, 140, dtype=torch.bfloat16, filter_eps=EPS)
    layer.linear.weight.data = weight
    hidden.requires_grad_()
    layer(hidden, y).backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    F.cross_entropy(F.linear(*exact), y).backward()
    for found, want in zip((hidden.grad, layer.linear.weight.grad), exact, strict=True):
        assert (found.double() - want.grad).norm() < 5e-3 * want.grad.norm()
    assert "filter_eps leaves out small tiles" in fastloss.explain(hidden, y, linear_weight=weight)
    assert "filter_eps no effect" in fastloss.explain(hidden.float(), y, linear_weight=weight.float())


def launches_of(target: str, dtype: torch.dtype, general: bool) -> list[Any]:
    """head_grad and products, in shapes of a large model's layer."""
    N, V, H = 260, 32000, 1024
    made = Head(torch.randn(N, H).to(dtype), torch.randn(V, H).to(dtype), torch.randn(V).to(dtype))
    spec = {"softcap": 5.0, "label_smoothing": 0.1} if general else {}
    weight = torch.rand(V) if general else None
    rows = Rows(stand_in(made), torch.zeros(N, dtype=torch.int64), weight, make_spec(**spec))
    stats, up, grad = torch.empty(5, N), torch.empty(N), torch.empty(N, V, dtype=dtype)
    upstream = device.Upstream(up, up, up, up) if general else device.Upstream(up)

    def run(kernels: device.Kernels) -> None:
        size = kernels.head_tiles(rows, upstream)
        kept = torch.ones(-(-N // size[0]), -(-V // size[1]), dtype=torch.int8)
        filtering = (kept, EPS) if general else (None, 0.0)
        kernels.head_grad(rows, *made, stats, upstream, grad, *filtering)
        tiles = device.Tiles(kept, size, kernels.kept_product)
        tiles.t().matmul(grad.t(), made.hidden, torch.empty(V, H), not general)
        if not general:
            tiles.matmul(grad, made.weight, torch.empty(N, H))

    return launches(run, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "general"), [(torch.bfloat16, False), (torch.float16, True)], ids=str)
def test_machine_code(target, dtype, general):
    """In every shape."""
    for launch in launches_of(target, dtype, general):
        assert_multiplies_well(launch, target)


@pytest.mark.parametrize("bad", [-1e-9, float("inf"), float("nan"), "small"])
def test_bad_filter_eps(bad):
    with pytest.raises(ValueError, match="filter_eps: expected a finite number >= 0"):
        fastloss.linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1]), filter_eps=bad)


def test_elsewhere_the_gradient_is_exact(generator):
    given, y = head(6, 50, 8, torch.bfloat16, generator)

    def loss(eps: float) -> Any:
        return lambda hidden, weight: (fastloss.linear_cross_entropy(hidden, weight, y, filter_eps=eps),)

    found = [gradients(given[:2], loss(eps), [torch.ones(())]) for eps in (0.0, 0.5)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("shape", [(0, 20, 8), (3, 20, 0)])
def test_nothing_to_multiply(log, shape):  # noqa: F811
    N, V, H = shape
    hidden, weight = (torch.zeros(n, H, dtype=torch.bfloat16, requires_grad=True) for n in (N, V))
    fastloss.linear_cross_entropy(
        hidden, weight, torch.zeros(N, dtype=torch.int64), reduction="sum", filter_eps=EPS
    ).backward()
    assert hidden.grad.shape == (N, H) and weight.grad.shape == (V, H) and not weight.grad.any()


@pytest.mark.parametrize("options", ["bias", "softcap"])
def test_heads_of_the_cuda_backend(log, options, generator):  # noqa: F811
    """Are these too: of its rows, losses and gradients from statistics that Triton's kernels made."""
    dtype = (torch.bfloat16, torch.float16)[list(OPTIONS).index(options) % 2]
    with cuda_on_host():
        assert "leaves out small tiles" in fastloss.explain(
            torch.zeros(1, 8, dtype=dtype), torch.tensor([0]), linear_weight=torch.zeros(3, 8, dtype=dtype)
        )
        for reduction, filter_eps in ("none", None), ("mean", 1e-7):
            log.clear()
            check(5, 300, 40, dtype, generator, reduction, filter_eps=filter_eps, **OPTIONS[options])
            ran = {launch.kernel.split("(")[0] for launch in log}
            assert {"head_states", "head_grad"} <= ran and ("kept_product" in ran) == (filter_eps is not None)
        # The weight's gradient by blocks of classes: csrc/cuda continues from Triton's statistics.
        check(12, 300, 40, dtype, generator, "none", max_chunk_bytes=4 * 300 * 8, **OPTIONS[options])


def test_the_cuda_backend_without_triton(generator, monkeypatch):
    """Takes the library's products, and says that filter_eps has no effect."""
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    with cuda_on_host():
        said = fastloss.explain(torch.zeros(1, 8).half(), torch.tensor([0]), linear_weight=torch.zeros(3, 8).half())
        assert "filter_eps no effect: the gradient is exact" in said
        check(5, 30, 8, torch.float16, generator, "mean", filter_eps=0.5)
