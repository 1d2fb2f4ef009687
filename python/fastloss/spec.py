"""What one call asks for: the records that pass from the public functions through autograd to a backend."""

from __future__ import annotations

import operator
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .strides import count_rows

NUMBERS: tuple[type, ...] = (float, int, torch.SymFloat, torch.SymInt)
try:
    import numpy
except ImportError:  # torch works without it
    pass
else:
    NUMBERS += (numpy.number, numpy.bool_)

PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))  # with an address of their own; subclasses may have none
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
COMPUTE_DTYPE = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}


class Objective(IntEnum):
    """What the target of a row is, and what is asked of the logits against it; csrc/row_loss.h has the same list."""

    # Attributes, not properties: a small call asks several times, and has no time for functions.
    indexed: bool  # the target is class indices, of which some may be ignored
    paired: bool  # the target is logits

    def __new__(cls, value: int, target: str = "") -> Objective:
        made = int.__new__(cls, value)
        made._value_ = value
        made.indexed, made.paired = target == "indices", target == "logits"
        return made

    __hash__ = int.__hash__

    INDEX = 0, "indices"  # cross-entropy of a class index
    PROBS = 1, "probabilities"  # cross-entropy of class probabilities
    TOPK = 2, "indices"  # cross-entropy of the probabilities of some classes
    TOPK_TAIL = 3, "indices"  # and of all the others as one class
    FORWARD_KL = 4, "logits"  # KL(q || p), q the softmax of target logits
    REVERSE_KL = 5, "logits"  # KL(p || q)
    JS = 6, "logits"  # beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p


class Spec(NamedTuple):
    """The numbers that shape a loss over a vocabulary; the same for all rows."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0  # 0: none
    logit_scale: float = 1.0
    objective: Objective = Objective.INDEX
    target_scale: float = 1.0  # of target logits
    beta: float = 0.5


class Rows(NamedTuple):
    """Rows of logits (N, V) and their targets: class indices (N,) or (N, K) int64, with the `probs` (N, K) of the
    latter; class probabilities (N, V); or target logits (N, V). Class weights (V,). What is (N, V) may also be
    (..., V), of N rows in row-major order: as it came, so that views are read where they lie.

    Code that torch.compile traces reads no property of it: torch 2.9 cannot, of a named tuple."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    spec: Spec
    probs: Tensor | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        return COMPUTE_DTYPE[self.input.dtype]

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.input, self.target, self.weight, self.probs

    @property
    def N(self) -> int:
        """How many rows."""
        return count_rows(self.input)

    @property
    def V(self) -> int:
        """How many classes."""
        return self.input.shape[-1]

    def flat(self) -> Rows:
        """With all that is (..., V) as (N, V): for torch's own operations, which copy more than this may."""
        target = self.target if self.spec.objective.indexed else self.target.flatten(0, -2)
        return self._replace(input=self.input.flatten(0, -2), target=target)

    def logits_of(self, index: Tensor) -> Tensor:
        """Of the classes (N, K), (N, K)."""
        K = index.shape[1]
        return self.input.gather(-1, index.reshape(*self.input.shape[:-1], K)).reshape(index.shape)


class Reduction(NamedTuple):
    """From losses (N,) to what the caller asked for. `token_weight` (N,) and `normalizer` () in the compute dtype."""

    kind: str
    token_weight: Tensor | None
    normalizer: Tensor | None
    dtype: torch.dtype


def make_spec(
    ignore_index: Any = -100,
    label_smoothing: Any = 0.0,
    z_loss: Any = 0.0,
    softcap: Any = None,
    logit_scale: Any = 1.0,
    objective: Objective = Objective.INDEX,
    temperature: Any = 1.0,
    beta: float = 0.5,
) -> Spec:
    """A checked `Spec`. Numbers may come as torch's argument parser takes them: NumPy's, or in 0-d tensors."""
    return _cached(
        objective,
        ignore_index if type(ignore_index) is int else _integer("ignore_index", ignore_index),
        label_smoothing if type(label_smoothing) is float else _real("label_smoothing", label_smoothing),
        z_loss if type(z_loss) is float else _real("z_loss", z_loss),
        0.0 if softcap is None else _positive("softcap", softcap),
        1.0 if type(logit_scale) is float and logit_scale == 1 else _positive("logit_scale", logit_scale),
        1.0 if type(temperature) is float and temperature == 1 else _positive("temperature", temperature),
        beta,
    )


def _integer(name: str, value: Any) -> int:
    if not isinstance(value, (bool, float)) and not (isinstance(value, torch.Tensor) and value.dtype is torch.bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"argument '{name}' must be int, not {type(value).__name__}")


def _real(name: str, value: Any) -> float:
    # What torch's argument parser takes for a float; a tensor's number must not lose a gradient on the way.
    if isinstance(value, torch.Tensor):
        number = value.dim() == 0 and not value.requires_grad
    else:
        number = isinstance(value, NUMBERS)
    if not number:
        raise TypeError(f"argument '{name}' must be float, not {type(value).__name__}")
    return float(value)


def _positive(name: str, value: Any) -> float:
    number = _real(name, value)
    if not 0 < number < float("inf"):
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    return number


def _check(
    objective: Objective,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    temperature: float,
    beta: float,
) -> Spec:
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected a 64-bit integer, got {ignore_index}")
    if label_smoothing > 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    # torch ignores a label_smoothing that is not above zero; so must a drop-in.
    label_smoothing = label_smoothing if label_smoothing > 0 else 0.0
    # The softcap's and the scale's quotients: cap tanh(s x / cap) / T = (cap / T) tanh((s / T) x / (cap / T)).
    squash = softcap / temperature, logit_scale / temperature
    return Spec(ignore_index, label_smoothing, z_loss, *squash, objective, 1 / temperature, beta)


_remembered = lru_cache(maxsize=256)(_check)  # a training run asks for the same one at every step


def _cached(objective: Objective, *numbers: Any) -> Spec:
    if torch.compiler.is_compiling():
        return _check(objective, *map(constant, numbers))
    return _remembered(objective, *numbers)


def constant(number: Any) -> Any:
    """A number that the compiler may take for a constant. Dynamo makes a graph input of a float that changes, with
    dynamic=True of every default too, which a second loss in the same graph cannot share."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return guard_scalar(number)
