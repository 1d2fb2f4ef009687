"""Random shapes, strides, dtypes and options: never further from float64 than torch, and torch's exceptions."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from engines import ONE_OF_EACH, on_engine
from torch import Tensor

import fastloss

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")

quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much]
settings.register_profile("ci", derandomize=True, database=None, deadline=None, suppress_health_check=quiet)
settings.register_profile("explore", deadline=None, suppress_health_check=quiet)  # other examples every time
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
fuzz = settings(PROFILE, max_examples=500)
fuzz_more = settings(PROFILE, max_examples=1000)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CLASSES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 257, 1030)  # around vectors, and past the first tile
LAYOUTS = ("dense", "classes last", "every other", "offset", "one row for all")
UPSTREAM = ("random", "one for all", "transposed", "zero")


class Call(NamedTuple):
    """One call of cross_entropy, with the tensors already laid out as asked."""

    input: Tensor
    target: Tensor
    options: dict[str, Any]
    upstream: str

    @property
    def rows(self) -> int:
        return self.input.numel() // max(1, self.input.shape[0 if self.input.dim() == 1 else 1])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values (but for "one row for all") with other strides and another offset."""
    if layout == "classes last" and x.dim() > 1:
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x.t().contiguous().t()
    if layout == "every other":
        return torch.stack([x, x + 1 if x.is_floating_point() else x], -1).flatten(-2)[..., ::2] if x.dim() else x
    if layout == "offset":
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    if layout == "one row for all" and x.dim() > 1 and len(x):
        return x[:1].expand(x.shape)
    return x


@st.composite
def calls(draw: st.DrawFn, extras: bool = False) -> Call:
    torch.manual_seed(draw(st.integers(0, 2**20)))
    C, N = draw(st.sampled_from(CLASSES)), draw(st.integers(0, 9))
    inner = draw(st.lists(st.integers(0, 3), max_size=3)) if C <= 64 else []
    shape = draw(st.sampled_from([(C,), (N, C), (N, C), (N, C, *inner)]))
    dtype = draw(st.sampled_from(DTYPES))
    # Of no great magnitude: there a float32 of torch's is no better than ours, and test_numerics.py has its own cases.
    x = (torch.randn(shape, dtype=torch.float64) * draw(st.sampled_from([0.01, 1.0, 8.0, 30.0]))).to(dtype)
    x = laid_out(x, draw(st.sampled_from(LAYOUTS)))
    options: dict[str, Any] = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
    }
    if draw(st.booleans()):
        options["weight"] = (torch.rand(C) + 0.05).to(dtype)
        if draw(st.booleans()):
            options["weight"][draw(st.integers(0, C - 1))] = 0
    if draw(st.booleans()):
        kinds = [dtype] if dtype == torch.float64 else [dtype, torch.float32]
        target = torch.randn(shape).softmax(min(1, len(shape) - 1)).to(draw(st.sampled_from(kinds)))
        if draw(st.booleans()):
            target = torch.where(target > target.mean(), target, 0)  # need not sum to 1
    else:
        target = draw(index_targets(shape, C, options))
    target = laid_out(target, draw(st.sampled_from(LAYOUTS[:4])))
    return Call(x, target, options, draw(st.sampled_from(UPSTREAM)))


@st.composite
def index_targets(draw: st.DrawFn, shape: tuple[int, ...], C: int, options: dict[str, Any]) -> Tensor:
    where = shape[:1] + shape[2:] if len(shape) > 1 else ()  # torch takes (1,) too, but its backward does not
    ignore = draw(st.sampled_from([-100, -1, 0, C - 1, C, 10**12]))
    if ignore != -100:
        options["ignore_index"] = ignore
    target = torch.randint(C, where)
    target = torch.where(torch.rand(where) < draw(st.sampled_from([0.0, 0.3, 1.0])), ignore, target)
    small = ignore in range(256) and C <= 255
    kinds = [torch.int64] + [torch.int32] * (abs(ignore) < 2**31) + [torch.uint8] * (small and len(shape) < 3)
    return target.to(draw(st.sampled_from(kinds)))


def upstream_like(value: Tensor, kind: str) -> Tensor:
    if kind == "zero":
        return torch.zeros_like(value)
    if kind == "one for all":
        return torch.full((), 0.7, dtype=value.dtype).expand(value.shape)
    g = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
    return torch.stack([g, g + 5], -1)[..., 0] if kind == "transposed" else g


def value_and_grad(loss: Callable[..., Tensor], call: Call, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Loss and gradient of the logits, whose strides are kept; everything in another dtype if one is given."""

    def cast(t: Any) -> Any:
        return t.to(dtype) if dtype is not None and isinstance(t, Tensor) and t.is_floating_point() else t

    input = cast(call.input).detach().requires_grad_()
    options = {k: cast(v) for k, v in call.options.items()}
    value = loss(input, cast(call.target), **options)
    upstream = upstream_like(value.detach(), call.upstream)
    if value.dim() == 0 and call.upstream == "random":
        upstream = upstream + 0.5
    return [value.detach(), torch.autograd.grad(value, input, upstream)[0]]


def largest(t: Tensor | None) -> float:
    return 0.0 if t is None or not t.numel() else float(t.detach().abs().nan_to_num(0, 0, 0).max())


def weighs_nothing(call: Call) -> bool:
    """A mean over targets, all of which have a class weight of zero."""
    weight = call.options.get("weight")
    if weight is None or call.target.is_floating_point() or call.options["reduction"] != "mean":
        return False
    valid = call.target[call.target != call.options.get("ignore_index", -100)].long()
    return valid.numel() > 0 and not weight[valid].any()


def coefficient(call: Call) -> float:
    """The largest factor before any p_j of the gradient: an error of p must be measured against it."""
    weight = call.options.get("weight")
    factor = 2 * max(1.0, largest(weight))
    if call.target.is_floating_point():
        factor *= max(1.0, largest(call.target.double().sum(0 if call.input.dim() == 1 else 1)))
    if call.options["reduction"] != "mean":
        return factor
    if call.target.is_floating_point():
        return factor / max(1, call.rows)
    valid = call.target[call.target != call.options.get("ignore_index", -100)].long()
    total = float(valid.numel() if weight is None else weight[valid].double().sum())
    return factor / total if total else factor


def check_against(got: list[Tensor], theirs: list[Tensor], exact: list[Tensor], scales: list[float]) -> None:
    """Like torch's in dtype, shape and NaNs, and as near to float64 as torch's or, but for a rounding, nearer."""
    for ours, torchs, want, scale in zip(got, theirs, exact, scales, strict=True):
        assert ours.dtype == torchs.dtype and ours.shape == torchs.shape
        assert torch.equal(ours.isnan(), want.isnan()), (ours, want)
        eps = torch.finfo(torch.float64 if ours.dtype == torch.float64 else torch.float32).eps
        # In float64 the oracle has rounded as well: its sums of C terms differ from ours by their order.
        ulps = max(8, CLASSES[-1] // 16) if ours.dtype == torch.float64 else 1
        slack = ulps * torch.finfo(ours.dtype).eps * want.abs().nan_to_num(0) + 8 * eps * scale
        slack = slack + torch.finfo(ours.dtype).smallest_normal  # subnormal results have fewer bits
        error = (ours.double() - want).abs().nan_to_num(0)
        allowed = largest(torchs.double() - want)
        assert bool((error <= allowed + slack).all()), f"{largest(error):.3g}, torch {allowed:.3g}, scale {scale:.3g}"


@pytest.mark.parametrize("backend", ONE_OF_EACH)
@fuzz_more
@given(call=calls())
def test_like_torch(backend: str, call: Call) -> None:
    assume(not weighs_nothing(call))  # x / 0, where torch adds one NaN to one infinity: nobody's promise
    before = (call.input.clone(), call.target.clone())
    signed = call if call.target.is_floating_point() else call._replace(target=call.target.long())
    with on_engine(backend):
        got = value_and_grad(fastloss.cross_entropy, call)
    theirs, exact = value_and_grad(F.cross_entropy, signed), value_and_grad(F.cross_entropy, signed, torch.float64)
    magnitude = 1 + largest(call.input)
    rows = call.rows if call.options["reduction"] == "sum" else 1
    scale = coefficient(call) * magnitude
    check_against(got, theirs, exact, [scale * rows, 3 * scale])
    assert torch.equal(call.input, before[0]) and torch.equal(call.target, before[1])
    with torch.no_grad():
        assert torch.equal(fastloss.cross_entropy(call.input, call.target, **call.options).isnan(), got[0].isnan())


# ---- our options against the textbook ----------------------------------------------------------------------------


@st.composite
def our_options(draw: st.DrawFn, call: Call) -> dict[str, Any]:
    options: dict[str, Any] = {
        "z_loss": draw(st.sampled_from([0.0, 1e-4, 0.3])),
        "softcap": draw(st.sampled_from([None, 1.0, 15.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.25, 2.0])),
        "out_dtype": draw(st.sampled_from([None, torch.float32, torch.float64])),
    }
    shape = F.cross_entropy(call.input.double(), with_longs(call), **doubled(call), reduction="none").shape
    if draw(st.booleans()):
        options["token_weight"] = laid_out(torch.rand(shape) + 0.1, draw(st.sampled_from(LAYOUTS[:4])))
    if call.options["reduction"] != "none":
        options["normalizer"] = draw(st.sampled_from([None, 3, 2.5, torch.tensor(4.0), torch.tensor([7])]))
    return options


def with_longs(call: Call) -> Tensor:
    return call.target.double() if call.target.is_floating_point() else call.target.long()


def doubled(call: Call) -> dict[str, Any]:
    options = {k: v.double() if isinstance(v, Tensor) else v for k, v in call.options.items()}
    return {k: v for k, v in options.items() if k != "reduction"}


def textbook(x: Tensor, call: Call, our: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The definition, row by row, in float64: loss, and statistics of the rows (N,)."""
    C = x.shape[0 if x.dim() == 1 else 1]
    z = (x.double()[None] if x.dim() == 1 else x.double()).movedim(1, -1).reshape(-1, C) * our["logit_scale"]
    if our["softcap"]:
        z = our["softcap"] * torch.tanh(z / our["softcap"])
    lse = torch.logsumexp(z, -1)
    log_p = z - lse[:, None]
    w = call.options.get("weight", torch.ones(C)).double()
    soft = call.target.is_floating_point()
    if soft:
        q = (call.target.double()[None] if x.dim() == 1 else call.target.double()).movedim(1, -1).reshape(-1, C)
        valid, count = torch.ones(len(q), dtype=torch.bool), torch.ones(len(q), dtype=torch.float64)
    else:
        y = call.target.long().reshape(-1)
        valid = y != call.options.get("ignore_index", -100)
        y = torch.where(valid, y, 0)
        q, count = F.one_hot(y, C).double(), w[y]
    eps = call.options["label_smoothing"]
    smooth = w * ((1 - eps) * q + eps / C)
    token = our["token_weight"].double().reshape(-1) if our.get("token_weight") is not None else torch.ones_like(count)
    rows = torch.where(valid, (-(smooth * log_p).sum(-1) + our["z_loss"] * lse**2) * token, 0)
    log_prob = (smooth * log_p).sum(-1) if soft else torch.where(valid, (q * log_p).sum(-1), 0)
    entropy = -(log_p.exp() * log_p).sum(-1)
    lse, entropy = (torch.where(valid, t, 0) for t in (lse, entropy))  # an ignored row has none
    stats = {"lse": lse, "log_prob": log_prob, "entropy": entropy, "z": z}
    if call.options["reduction"] == "none":
        return rows, stats
    mean = torch.where(valid, count * token, 0).sum() if call.options["reduction"] == "mean" else 1.0
    normalizer = our.get("normalizer")
    return rows.sum() / (mean if normalizer is None else torch.as_tensor(normalizer).double().reshape(())), stats


def close(got: Tensor, want: Tensor, dtype: torch.dtype, scale: float, what: str) -> None:
    eps = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(
        got.detach().double(), want, rtol=eps, atol=eps * scale, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


@pytest.mark.parametrize("backend", ONE_OF_EACH)
@fuzz
@given(data=st.data())
def test_our_options_like_the_textbook(backend: str, data: st.DataObject) -> None:
    call = data.draw(calls())
    our = data.draw(our_options(call))
    x = call.input.detach().requires_grad_()
    oracle = call.input.detach().double().requires_grad_()
    want, stats = textbook(oracle, call, our)
    stated = data.draw(st.booleans())
    with on_engine(backend):
        got = fastloss.cross_entropy(x, call.target, return_stats=stated, **call.options, **our)
        if stated:
            got, ours = got
        upstream = upstream_like(got.detach().double(), call.upstream)
        (grad,) = torch.autograd.grad(got, x, upstream.to(got.dtype), retain_graph=stated)
    if not want.isfinite().all():  # a mean over weights of zero
        assert torch.equal(got.reshape(want.shape).isfinite(), want.isfinite())
        return
    upstream = upstream.to(got.dtype).double().reshape(want.shape)
    scale = 1 + largest(oracle) * max(1, our["logit_scale"]) * (1 + our["z_loss"] * 2 * (1 + largest(oracle)))
    per_row = coefficient(call) * max(1.0, largest(our.get("token_weight")))
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    close(got.reshape(want.shape), want, min(got.dtype, compute, key=lambda d: d.itemsize), scale * per_row, "loss")
    (exact,) = torch.autograd.grad(want, oracle, upstream, retain_graph=stated)
    factor = scale * per_row * max(1, our["logit_scale"])
    if our.get("token_weight") is not None and call.options["reduction"] == "mean":
        factor *= 10  # the denominator holds the token weights, which are at least a tenth
    close(grad, exact, x.dtype, factor, "gradient")
    if stated:
        check_stats(ours, stats, x, call, oracle, scale * per_row)


def check_stats(
    ours: fastloss.CrossEntropyStats, stats: dict[str, Tensor], x: Tensor, call: Call, oracle: Tensor, scale: float
) -> None:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name in ("lse", "log_prob", "entropy"):
        assert getattr(ours, name).dtype == compute
        close(getattr(ours, name).reshape(-1), stats[name], compute, scale, name)
        got = torch.autograd.grad(getattr(ours, name).sum(), x, retain_graph=True)[0]
        want = torch.autograd.grad(stats[name].sum(), oracle, retain_graph=True)[0]
        close(got, want, x.dtype, scale, f"gradient of {name}")
    z, top = stats["z"], ours.argmax.reshape(-1, 1)
    counts = torch.ones(len(z), dtype=torch.bool)
    if not call.target.is_floating_point():
        counts = (call.target != call.options.get("ignore_index", -100)).reshape(-1)
        assert not top[~counts].any()
    close(z.gather(-1, top)[counts, 0], z.amax(-1)[counts], compute, 1 + largest(z), "argmax")  # of equal logits, any
    if not call.target.is_floating_point():
        valid = call.target != call.options.get("ignore_index", -100)
        assert torch.equal(ours.correct, (ours.argmax == call.target) & valid)
    assert (ours.correct is None) == call.target.is_floating_point()


# ---- wrong calls ---------------------------------------------------------------------------------------------------


def spoil_target(draw: st.DrawFn, call: Call) -> Call:
    """One class index out of range, or (probabilities) an integer dtype."""
    if call.target.is_floating_point():
        return call._replace(target=call.target.long())
    assume(call.target.numel())
    target = call.target.long().clone().reshape(-1)
    C = call.input.shape[0 if call.input.dim() == 1 else 1]
    target[draw(st.integers(0, target.numel() - 1))] = draw(st.sampled_from([C, C + 1, -1, -2, -101, 2**40, -(2**63)]))
    return call._replace(target=target.reshape(call.target.shape))


def spoil_shape(draw: st.DrawFn, call: Call) -> Call:
    change = draw(st.sampled_from(["longer", "shorter", "deeper", "flatter", "scalar"]))
    t = call.target
    if change == "longer":
        return call._replace(target=torch.cat([t, t]) if t.dim() else t[None].repeat(2))
    if change == "shorter":
        return call._replace(target=t[:-1] if t.dim() else t)
    if change == "deeper":
        return call._replace(target=t[..., None])
    return call._replace(target=t.reshape(-1) if change == "flatter" else t.new_zeros(()))


def spoil_dtype(draw: st.DrawFn, call: Call) -> Call:
    if draw(st.booleans()):
        return call._replace(target=call.target.to(draw(st.sampled_from([torch.int16, torch.bool, torch.complex64]))))
    return call._replace(input=call.input.to(draw(st.sampled_from([torch.int64, torch.bool, torch.complex64]))))


def spoil_weight(draw: st.DrawFn, call: Call) -> Call:
    C = call.input.shape[0 if call.input.dim() == 1 else 1]
    dtype = call.input.dtype
    bad = [torch.ones(C + 1, dtype=dtype), torch.ones(C, dtype=torch.int64)]
    if call.input.dim() <= 2:  # of more dimensions, torch looks at the number of weights only; we at their shape
        bad.append(torch.ones(1, C, dtype=dtype))
    bad.append(torch.ones(C, dtype=torch.float64 if dtype == torch.float32 else torch.float32))
    return call._replace(options=call.options | {"weight": draw(st.sampled_from(bad))})


def spoil_option(draw: st.DrawFn, call: Call) -> Call:
    bad = [{"reduction": "max"}, {"reduction": None}, {"label_smoothing": 1.01}, {"label_smoothing": "no"}]
    bad += [{"ignore_index": 1.5}, {"ignore_index": None}, {"ignore_index": 0}]
    return call._replace(options=call.options | draw(st.sampled_from(bad)))


@st.composite
def spoiled_calls(draw: st.DrawFn) -> Call:
    spoil = draw(st.sampled_from([spoil_target, spoil_target, spoil_shape, spoil_dtype, spoil_weight, spoil_option]))
    return spoil(draw, draw(calls()))


def attempt(loss: Callable[..., Tensor], call: Call, **more: Any) -> tuple[Tensor | None, Exception | None]:
    try:
        return loss(call.input, call.target, **call.options, **more), None
    except Exception as error:  # which one it is, is the question
        return None, error


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@fuzz_more
@given(call=spoiled_calls(), inplace=st.booleans())
def test_errors_like_torch(backend: str, call: Call, inplace: bool) -> None:
    # torch refuses int32 classes, and uint8 classes with smoothing and weights; we do not.
    assume(call.target.dtype != torch.int32 and (call.target.dtype != torch.uint8 or "weight" not in call.options))
    assume(call.input.dim() > 1 or call.target.shape != (1,))  # torch takes these, but not with label smoothing
    assume(call.input.is_floating_point() or call.input.numel())  # torch takes integer logits where there are none
    dense = call.input.is_contiguous() and call.input.dim() == 2
    if call.input.is_floating_point():
        leaf = call.input.clone(memory_format=torch.preserve_format).requires_grad_()
        call = call._replace(input=leaf * 1 if inplace and dense else leaf)
    before, version = call.input.detach().clone(), call.input._version
    target = call.target.clone()
    theirs, expected = attempt(F.cross_entropy, call)
    with fastloss.use_backend(backend):
        ours, error = attempt(fastloss.cross_entropy, call, **({"inplace": True} if inplace and dense else {}))
    if call.rows == 0 and (error is None) <= (expected is None):
        return  # where there is nothing to compute, torch leaves some arguments unread, or trips over its own feet
    assert (error is None) == (expected is None), f"ours {error!r}, torch {expected!r}"
    if expected is None:
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        return
    assert isinstance(error, type(expected)), f"ours {error!r}, torch {expected!r}"
    assert torch.equal(call.input.detach(), before) and torch.equal(call.target, target)
    assert call.input._version == version
    assert not call.input.is_floating_point() or leaf.grad is None
