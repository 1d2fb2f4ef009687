"""Wrong calls: torch's exception type, a message that names the argument, and nothing written before it is raised."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss

np = pytest.importorskip("numpy")

N, V = 3, 5
BACKENDS = ("cpu", "reference")


@pytest.fixture(params=BACKENDS, autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with fastloss.use_backend(request.param):
        yield


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-2, 2, int(np.prod(shape or (N, V)))).reshape(shape or (N, V)).to(dtype)


def classes(*values: int) -> Tensor:
    return torch.tensor(values or (0, 1, 2))


def positions() -> Tensor:
    return torch.arange(12).reshape(3, 4) % V


def differentiable() -> Tensor:
    return torch.tensor(0.5, requires_grad=True)


def probs(dtype: torch.dtype = torch.float32) -> Tensor:
    return logits().softmax(-1).to(dtype)


def ones(*shape: int, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    return torch.ones(*shape or (V,), dtype=dtype, **options)


# What is wrong -> (a word the message must hold, the call). torch itself says which exception it is.
Call = Callable[[Callable[..., Any]], Any]
SAME_AS_TORCH: dict[str, tuple[str, Call]] = {
    # shapes
    "batch of another size": ("batch_size", lambda C: C(logits(), classes(0, 1))),
    "batch, 0-d target": ("batch_size", lambda C: C(logits(), torch.tensor(0))),
    "no row, 0-d target": ("target", lambda C: C(logits()[:0], torch.tensor(0))),
    "batch, (N, 1) target": ("target", lambda C: C(logits(), classes()[:, None])),
    "batch, (N, 2) target": ("target", lambda C: C(logits(), torch.zeros(3, 2, dtype=torch.long))),
    "one row, two targets": ("target", lambda C: C(logits(V), classes(0, 1))),
    "one row, 2-d target": ("target", lambda C: C(logits(V), classes(0)[None])),
    "3-d, another batch": ("batch_size", lambda C: C(logits(3, 5, 4), torch.zeros(2, 4, dtype=torch.long))),
    "3-d, another position count": ("target", lambda C: C(logits(3, 5, 4), torch.zeros(3, 3, dtype=torch.long))),
    "3-d, 1-d target": ("target", lambda C: C(logits(3, 5, 4), classes())),
    "4-d, 2-d target": ("target", lambda C: C(logits(3, 5, 2, 2), torch.zeros(3, 2, dtype=torch.long))),
    "scalar logits": ("target", lambda C: C(torch.tensor(1.0), torch.tensor(0))),
    "no class, a target": ("target", lambda C: C(logits()[:, :0], classes())),
    # two mistakes at once: torch's order
    "float (2, V) target of one row": ("batch_size", lambda C: C(logits(1, V), probs()[:2])),
    "float target of another batch": ("batch_size", lambda C: C(logits(), classes(0, 1).float())),
    "one row, two float targets": ("target", lambda C: C(logits(V), classes(0, 1).float())),
    # class indices
    "class V": ("target", lambda C: C(logits(), classes(0, 1, V))),
    "class -1": ("target", lambda C: C(logits(), classes(0, 1, -1))),
    "class V, unreduced": ("target", lambda C: C(logits(), classes(0, 1, V), reduction="none")),
    "class V, smoothed": ("target", lambda C: C(logits(), classes(0, 1, V), label_smoothing=0.1)),
    "class V, weighted": ("target", lambda C: C(logits(), classes(0, 1, V), ones())),
    "class V in 3-d": ("target", lambda C: C(logits(3, 5, 4), torch.full((3, 4), V))),
    "the default ignore_index is not one": ("target", lambda C: C(logits(), classes(0, 1, -100), ignore_index=1)),
    "a huge class": ("target", lambda C: C(logits(), classes(0, 1, 2**62))),
    "the least class": ("target", lambda C: C(logits(), classes(0, 1, -(2**63)))),
    # dtypes
    "float classes": ("target", lambda C: C(logits(), classes().float())),
    "int16 classes": ("target", lambda C: C(logits(), classes().short())),
    "bool classes": ("target", lambda C: C(logits(), classes().bool())),
    "int64 probabilities": ("target", lambda C: C(logits(), logits().long())),
    "int64 logits": ("input", lambda C: C(logits().long(), classes())),
    "bool logits": ("input", lambda C: C(logits().bool(), classes())),
    "complex logits": ("input", lambda C: C(logits() + 0j, classes())),
    "float8 logits": ("input", lambda C: C(logits(dtype=torch.float8_e4m3fn), classes())),
    "sparse logits": ("input", lambda C: C(logits().to_sparse(), classes())),
    # weight
    "too few weights": ("weight", lambda C: C(logits(), classes(), ones(V - 1))),
    "too many weights": ("weight", lambda C: C(logits(), classes(), ones(V + 1))),
    "2-d weights": ("weight", lambda C: C(logits(), classes(), ones(1, V))),
    "too few weights, no row": ("weight", lambda C: C(logits()[:0], classes()[:0], ones(V - 1))),
    "too few weights, smoothed": ("weight", lambda C: C(logits(), classes(), ones(V - 1), label_smoothing=0.1)),
    "too few weights, probabilities": ("weight", lambda C: C(logits(), probs(), ones(V - 1))),
    "2-d weights, probabilities": ("weight", lambda C: C(logits(), probs(), ones(N, V))),
    "2-d weights, one row": ("weight", lambda C: C(logits(V), torch.tensor(1), ones(1, V))),
    "2-d weights, 3-d probabilities": ("weight", lambda C: C(logits(3, 5, 4), logits(3, 5, 4), ones(1, V))),
    "too few weights, 3-d": ("weight", lambda C: C(logits(3, 5, 4), positions(), ones(1, V - 1))),
    "(1, V) weights, smoothed": ("weight", lambda C: C(logits(3, 5, 4), positions(), ones(1, V), label_smoothing=0.1)),
    "(V, 1) weights, smoothed mean": (
        "weight",
        lambda C: C(logits(3, 5, 4), positions(), ones(V, 1), label_smoothing=0.1),
    ),
    "0-d weight, smoothed": (
        "dimension",
        lambda C: C(logits(3, 1, 4), 0 * positions(), torch.tensor(1.0), label_smoothing=0.1),
    ),
    "(1, V) float64 weights": ("weight", lambda C: C(logits(3, 5, 4), positions(), ones(1, V, dtype=torch.float64))),
    "float64 weights": ("weight", lambda C: C(logits(), classes(), ones(dtype=torch.float64))),
    "float32 weights of bfloat16 logits": ("weight", lambda C: C(logits(dtype=torch.bfloat16), classes(), ones())),
    "int64 weights": ("weight", lambda C: C(logits(), classes(), ones(dtype=torch.long))),
    "weights that want a gradient": ("weight", lambda C: C(logits(), classes(), ones(requires_grad=True))),
    "list of weights": ("weight", lambda C: C(logits(), classes(), [1.0] * V)),
    # devices
    "target elsewhere": ("target", lambda C: C(logits(), classes().to("meta"))),
    "input elsewhere": ("input", lambda C: C(logits().to("meta"), classes())),
    "weight elsewhere": ("weight", lambda C: C(logits(), classes(), ones(device="meta"))),
    # options
    "reduction of another name": ("reduction", lambda C: C(logits(), classes(), reduction="max")),
    "no reduction": ("reduction", lambda C: C(logits(), classes(), reduction=None)),
    "reduction number": ("reduction", lambda C: C(logits(), classes(), reduction=1)),
    "label_smoothing > 1": ("label_smoothing", lambda C: C(logits(), classes(), label_smoothing=1.5)),
    "label_smoothing > 1, probabilities": ("label_smoothing", lambda C: C(logits(), probs(), label_smoothing=1.5)),
    "label_smoothing text": ("label_smoothing", lambda C: C(logits(), classes(), label_smoothing="a")),
    "no label_smoothing": ("label_smoothing", lambda C: C(logits(), classes(), label_smoothing=None)),
    "label_smoothing, differentiable": (
        "label_smoothing",
        lambda C: C(logits(), classes(), label_smoothing=differentiable()),
    ),
    "label_smoothing, probabilities, differentiable": (
        "label_smoothing",
        lambda C: C(logits(), probs(), label_smoothing=differentiable()),
    ),
    "label_smoothing vector": ("label_smoothing", lambda C: C(logits(), classes(), label_smoothing=ones(1))),
    "label_smoothing array": ("label_smoothing", lambda C: C(logits(), classes(), label_smoothing=np.array(0.1))),
    "label_smoothing fraction": ("label_smoothing", lambda C: C(logits(), classes(), label_smoothing=Fraction(1, 10))),
    "label_smoothing beyond float": ("", lambda C: C(logits(), classes(), label_smoothing=10**400)),
    "ignore_index in a float tensor": (
        "ignore_index",
        lambda C: C(logits(), classes(), ignore_index=torch.tensor(1.0)),
    ),
    "bool_ ignore_index": ("ignore_index", lambda C: C(logits(), classes(), ignore_index=np.bool_(True))),
    "ignore_index object of probabilities": ("ignore_index", lambda C: C(logits(), probs(), ignore_index=np.array(1))),
    "ignore_index of probabilities": ("ignore_index", lambda C: C(logits(), probs(), ignore_index=0)),
    "fractional ignore_index": ("ignore_index", lambda C: C(logits(), classes(), ignore_index=1.5)),
    "float ignore_index": ("ignore_index", lambda C: C(logits(), classes(), ignore_index=1.0)),
    "bool ignore_index": ("ignore_index", lambda C: C(logits(), classes(), ignore_index=True)),
    "no ignore_index": ("ignore_index", lambda C: C(logits(), classes(), ignore_index=None)),
    "ignore_index beyond int64": ("", lambda C: C(logits(), classes(), ignore_index=2**63)),
    # not tensors
    "list of targets": ("target", lambda C: C(logits(), [0, 1, 2])),
    "no input": ("input", lambda C: C(None, classes())),
    "no target": ("target", lambda C: C(logits(), None)),
    "numpy logits": ("input", lambda C: C(logits().numpy(), classes())),
    "numpy targets": ("target", lambda C: C(logits(), classes().numpy())),
    "missing target": ("target", lambda C: C(logits())),
    "unknown keyword": ("lable_smoothing", lambda C: C(logits(), classes(), lable_smoothing=0.1)),
}


def raised_by(loss: Callable[..., Any], call: Call) -> BaseException:
    with pytest.raises(Exception) as caught:
        call(loss)
    return caught.value


@pytest.mark.parametrize("name", SAME_AS_TORCH)
def test_exception_of_torch(name: str) -> None:
    word, call = SAME_AS_TORCH[name]
    theirs, ours = raised_by(F.cross_entropy, call), raised_by(fastloss.cross_entropy, call)
    assert type(ours) is type(theirs), f"torch: {type(theirs).__name__}: {theirs}"
    assert word in str(ours).lower()


@pytest.mark.parametrize("name", [n for n, (_, call) in SAME_AS_TORCH.items() if "keyword" not in n])
def test_exception_of_the_module(name: str) -> None:
    """nn.CrossEntropyLoss with the same arguments, split between constructor and call."""
    _, call = SAME_AS_TORCH[name]

    def through(module: type[torch.nn.Module]) -> Callable[..., Any]:
        return lambda *a, **options: module(*a[2:], **options)(*a[:2])

    theirs = raised_by(through(torch.nn.CrossEntropyLoss), call)
    assert type(raised_by(through(fastloss.CrossEntropyLoss), call)) is type(theirs)


def test_a_cached_check_is_not_a_check_skipped() -> None:
    """1 == 1.0 == True, but only one of them is an ignore_index."""
    fastloss.cross_entropy(logits(), classes(), ignore_index=1)
    for value in (1.0, True):
        with pytest.raises(TypeError, match="ignore_index"):
            fastloss.cross_entropy(logits(), classes(), ignore_index=value)


# torch's argument parser takes these for numbers.
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": torch.tensor(0.1)},
        {"label_smoothing": np.float32(0.1)},
        {"label_smoothing": np.float64(0.1)},
        {"label_smoothing": np.bool_(True)},
        {"label_smoothing": np.int64(1)},
        {"label_smoothing": torch.tensor(1)},
        {"label_smoothing": differentiable().detach()},
        {"label_smoothing": True},
        {"label_smoothing": -0.1},
        {"label_smoothing": float("nan")},
        {"ignore_index": torch.tensor(2)},
        {"ignore_index": torch.tensor([2])},
        {"ignore_index": np.int64(2)},
        {"ignore_index": np.array(2)},
        {"ignore_index": -(2**63)},
    ],
    ids=str,
)
def test_what_torch_accepts(options: dict[str, Any]) -> None:
    got = fastloss.cross_entropy(logits(), classes(), **options)
    torch.testing.assert_close(got, F.cross_entropy(logits(), classes(), **options))


# With class indices for logits of 3 or more dimensions torch only counts the weights; with label smoothing their first
# dimension must be the classes, and a mean wants a vector unless it has nothing to look up in it.
@pytest.mark.parametrize("size", [(3, V, 4), (2, V, 2, 3), (0, V, 4), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [False, True])
def test_shapes_of_weights(size: tuple[int, ...], reduction: str, label_smoothing: float, ignored: bool) -> None:
    C = size[1]
    target = torch.full(size[:1] + size[2:], -100 if ignored else C - 1)

    def outcome(loss: Callable[..., Tensor], weight: Tensor) -> Any:
        x = logits(*size).requires_grad_()
        try:
            value = loss(x, target, weight, reduction=reduction, label_smoothing=label_smoothing)
        except (RuntimeError, IndexError) as error:
            return type(error)
        # Of the mean of nothing torch's gradient is NaN, ours zero.
        return value.detach(), torch.autograd.grad(value.sum(), x)[0].nan_to_num()

    for shape in [(), (C,), (1, C), (C, 1), (1, C, 1), (C, 1, 1), (1,), (2, C), (C + 1,)]:
        weight = torch.linspace(0.5, 2, int(np.prod(shape))).reshape(shape)
        ours, theirs = outcome(fastloss.cross_entropy, weight), outcome(F.cross_entropy, weight)
        if isinstance(ours, type) or isinstance(theirs, type):
            assert ours is theirs, shape
        else:
            torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("size", [(3, 0), (3, 0, 4), (0, 0, 4), (2, 0, 2, 2)], ids=str)
def test_probabilities_of_no_class(size: tuple[int, ...], reduction: str) -> None:
    x = torch.zeros(size)
    got = fastloss.cross_entropy(x, x, reduction=reduction)
    torch.testing.assert_close(got, F.cross_entropy(x, x, reduction=reduction), equal_nan=True)


def test_a_number_in_a_tensor_is_read_each_time() -> None:
    smoothing = torch.tensor(0.1)
    first = fastloss.cross_entropy(logits(), classes(), label_smoothing=smoothing)
    smoothing.fill_(0.9)
    second = fastloss.cross_entropy(logits(), classes(), label_smoothing=smoothing)
    assert first != second
    torch.testing.assert_close(second, F.cross_entropy(logits(), classes(), label_smoothing=0.9))


OURS: dict[str, tuple[type[Exception], str, Call]] = {
    "softcap 0": (ValueError, "softcap", lambda C: C(logits(), classes(), softcap=0.0)),
    "softcap < 0": (ValueError, "softcap", lambda C: C(logits(), classes(), softcap=-1.0)),
    "softcap NaN": (ValueError, "softcap", lambda C: C(logits(), classes(), softcap=float("nan"))),
    "softcap, differentiable": (TypeError, "softcap", lambda C: C(logits(), classes(), softcap=differentiable())),
    "softcap text": (TypeError, "softcap", lambda C: C(logits(), classes(), softcap="a")),
    "logit_scale 0": (ValueError, "logit_scale", lambda C: C(logits(), classes(), logit_scale=0.0)),
    "logit_scale, differentiable": (
        TypeError,
        "logit_scale",
        lambda C: C(logits(), classes(), logit_scale=differentiable()),
    ),
    "logit_scale text": (TypeError, "logit_scale", lambda C: C(logits(), classes(), logit_scale="a")),
    "no logit_scale": (TypeError, "logit_scale", lambda C: C(logits(), classes(), logit_scale=None)),
    "z_loss, differentiable": (TypeError, "z_loss", lambda C: C(logits(), classes(), z_loss=differentiable())),
    "z_loss text": (TypeError, "z_loss", lambda C: C(logits(), classes(), z_loss="a")),
    "token_weight size": (ValueError, "token_weight", lambda C: C(logits(), classes(), token_weight=ones(2))),
    "token_weight list": (TypeError, "token_weight", lambda C: C(logits(), classes(), token_weight=[1, 1, 1])),
    "token_weight elsewhere": (
        RuntimeError,
        "token_weight",
        lambda C: C(logits(), classes(), token_weight=ones(N, device="meta")),
    ),
    "normalizer vector": (ValueError, "normalizer", lambda C: C(logits(), classes(), normalizer=ones(2))),
    "normalizer text": (TypeError, "normalizer", lambda C: C(logits(), classes(), normalizer="a")),
    "normalizer of no reduction": (
        ValueError,
        "normalizer",
        lambda C: C(logits(), classes(), normalizer=2.0, reduction="none"),
    ),
    "out_dtype int": (TypeError, "out_dtype", lambda C: C(logits(), classes(), out_dtype=torch.int64)),
    "positional z_loss": (
        TypeError,
        "argument",
        lambda C: C(logits(), classes(), None, None, -100, None, "mean", 0.0, 0.1),
    ),
    "inplace leaf": (RuntimeError, "inplace", lambda C: C(logits().requires_grad_(), classes(), inplace=True)),
    "inplace transposed": (ValueError, "inplace", lambda C: C(logits(V, N).t(), classes(), inplace=True)),
    "inplace expanded": (ValueError, "inplace", lambda C: C(logits(1, V).expand(N, V), classes(), inplace=True)),
    "inplace 3-d": (
        ValueError,
        "inplace",
        lambda C: C(logits(3, 5, 4), torch.zeros(3, 4, dtype=torch.long), inplace=True),
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_exception_of_our_options(name: str) -> None:
    kind, word, call = OURS[name]
    error = raised_by(fastloss.cross_entropy, call)
    assert type(error) is kind, repr(error)
    assert word in str(error)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_is_written_on_error(inplace: bool, reduction: str) -> None:
    leaf = logits(64, 33).requires_grad_()
    x, y = leaf * 1, torch.zeros(64, dtype=torch.long)
    y[-1] = 33  # the last row: everything before it could have been done
    before, version = x.detach().clone(), x._version
    with pytest.raises(IndexError, match=r"(?i)target"):
        fastloss.cross_entropy(x, y, reduction=reduction, inplace=inplace)
    assert torch.equal(x, before)
    assert x._version == version
    assert leaf.grad is None
    x.square().sum().backward()  # whoever saved x may still use it
    assert leaf.grad is not None


LEGACY = [
    ({"size_average": True}, "mean"),
    ({"size_average": False}, "sum"),
    ({"reduce": True}, "mean"),
    ({"reduce": False}, "none"),
    ({"size_average": False, "reduce": True}, "sum"),
    ({"size_average": True, "reduce": False, "reduction": "sum"}, "none"),
]


@pytest.mark.parametrize(("options", "reduction"), LEGACY, ids=str)
def test_deprecated_reductions(options: dict[str, Any], reduction: str) -> None:
    def call(loss: Callable[..., Tensor]) -> tuple[Tensor, list[tuple[type, str]]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = loss(logits(), classes(), **options)
        return value, [(w.category, str(w.message)) for w in caught]

    ours, warned = call(fastloss.cross_entropy)
    theirs, expected = call(F.cross_entropy)
    assert warned == expected and len(warned) == 1
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours, F.cross_entropy(logits(), classes(), reduction=reduction))


@pytest.mark.parametrize(("options", "reduction"), LEGACY, ids=str)
def test_deprecated_reductions_of_the_module(options: dict[str, Any], reduction: str) -> None:
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        module = fastloss.CrossEntropyLoss(**options)
    assert module.reduction == reduction


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_row_with_a_target_of_one_element(reduction: str) -> None:
    """As torch, () comes back; beyond torch, smoothed as well, and differentiable."""
    got = fastloss.cross_entropy(logits(V), classes(2), reduction=reduction)
    assert got.shape == F.cross_entropy(logits(V), classes(2), reduction=reduction).shape == ()
    for eps in (0.0, 0.1):
        x, row = logits(V).requires_grad_(), logits(V).requires_grad_()
        fastloss.cross_entropy(x, classes(2), reduction=reduction, label_smoothing=eps).backward()
        F.cross_entropy(row, torch.tensor(2), reduction=reduction, label_smoothing=eps).backward()
        torch.testing.assert_close(x.grad, row.grad)


def test_int32_classes_are_accepted() -> None:
    torch.testing.assert_close(fastloss.cross_entropy(logits(), classes().int()), F.cross_entropy(logits(), classes()))


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend.*reference.*nonsense"), fastloss.use_backend("nonsense"):
        pass
