"""What torch.utils.flop_counter.FlopCounterMode counts of our operators: two for each multiply-add of their matmuls.

From shapes alone: rows that are ignored count too, as do tiles that filter_eps leaves out, and a wrong guess of the
upstream gradient (upstream.py) does not. Where the logits are made again, they count again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from ..spec import Objective
from . import blocks, sharded  # noqa: F401  (which defines its operators)
from .heads import LinearRows, filters
from .rows import record

_COUNTER = "torch.utils.flop_counter"


def _matmul(given: LinearRows) -> int:
    """Of hidden states and weight; that of either's gradient takes as much."""
    return 2 * given.head.hidden.shape[0] * given.head.weight.numel()


def _logits(given: LinearRows) -> int:
    """Also a teacher's."""
    return _matmul(given) + (0 if given.teacher is None else _matmul(given._replace(head=given.teacher)))


def _grads(given: LinearRows, needs: list[bool]) -> int:
    """Of hidden states and weight, from logits that are made again: once for all, or by blocks once for each."""
    times = needs[0] + needs[1] if blocks.needed(given, needs) else any(needs)
    return times * _logits(given) + (needs[0] + needs[1]) * _matmul(given)


def _linear_loss(*args: Any, **__: Any) -> int:
    given, (_, _, needs, *_) = record(*args)
    if any(needs) and filters(given, given.backend()):
        return _logits(given) + _grads(given, needs)
    again = needs[1] and blocks.needed(given, needs)
    return (1 + again) * _logits(given) + (needs[0] + needs[1]) * _matmul(given)


def _linear_loss_grad(*_: Any, **__: Any) -> int:
    return 0


def _linear_row_loss(*args: Any, **__: Any) -> int:
    return _logits(record(*args)[0])


def _linear_row_grad(*args: Any, **__: Any) -> int:
    given, (_, _, needs) = record(*args)
    return _grads(given, needs)


def _sharded_head_loss(*args: Any, **__: Any) -> int:
    """Of this rank's classes; a mixture has two rounds."""
    given, _ = record(*args)
    return (1 + (given.rows.spec.objective == Objective.JS)) * _logits(given)


def _sharded_head_grad(*args: Any, **__: Any) -> int:
    given, (*_, needs) = record(*args)
    return _grads(given, needs)


FORMULAS = {
    "linear_loss": _linear_loss,
    "linear_loss_grad": _linear_loss_grad,
    "linear_row_loss": _linear_row_loss,
    "linear_row_grad": _linear_row_grad,
    "sharded_head_loss": _sharded_head_loss,
    "sharded_head_grad": _sharded_head_grad,
}


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.fastloss, name), get_raw=True)(formula)


class _WhenImported(MetaPathFinder):
    """Registers the formulas as soon as torch's counter is imported. To import it here would double the time that
    `import fastloss` takes, and a counter copies the registry when it is made: later is too late."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _COUNTER in sys.modules:
    _register(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _WhenImported())
