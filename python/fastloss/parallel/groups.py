"""Process groups: what they say of themselves, and the names that torch's operators find them by.

A group may be given where no default group exists. ``dist.get_rank(group)`` and ``dist.get_world_size(group)`` ask for
the default one first, so nothing here calls them but for None.
"""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

_counter = count()
_found: WeakKeyDictionary[Any, tuple[Any, str]] = WeakKeyDictionary()  # None in place of the key: it must not live on


def rank_and_size(group: Any) -> tuple[int, int]:
    """This process's rank in a group and how many it has; of None, all processes."""
    if group is None:
        return dist.get_rank(), dist.get_world_size()
    return group.rank(), group.size()


def check_group(group: Any) -> None:
    """Something that says its rank and size: a ``ProcessGroup``, or a bare backend such as ``ProcessGroupGloo``."""
    if group is not None and not (hasattr(group, "rank") and hasattr(group, "size")):
        raise TypeError(
            f"group: expected a torch.distributed process group that this rank belongs to, or None, got {group!r}"
        )


def resolved(group: Any) -> tuple[Any, str]:
    """A group as a ``ProcessGroup``, and a name that torch's operators find it by: they take no objects. A group that
    was made without ``init_process_group`` may have none and gets one here, outside compiled code."""
    if torch.compiler.is_compiling():  # a shard made in compiled code: its group must have a name
        return group, group.group_name
    if group not in _found:
        _found[group] = _resolve(group)
    made, name = _found[group]
    return group if made is None else made, name


def _resolve(group: Any) -> tuple[Any, str]:
    """What was made of a group, None where nothing had to be, and its name."""
    made = None if isinstance(group, dist.ProcessGroup) else _around(group)
    if made is None and _registered(group):
        return None, group.group_name
    name: Any = f"fastloss:{next(_counter)}"
    torch._C._distributed_c10d._register_process_group(name, group if made is None else made)
    return made, name


def _around(backend: Any) -> Any:
    """A ProcessGroup of one backend, which by itself has neither a name nor all collectives."""
    process_group: Any = dist.ProcessGroup  # mypy does not know that it needs no store
    group, kind = process_group(backend.rank(), backend.size()), backend.name().upper()
    backend_type = getattr(dist.ProcessGroup.BackendType, kind, dist.ProcessGroup.BackendType.CUSTOM)
    for device in dist.Backend.backend_capability.get(kind.lower(), ["cpu"]):
        group._register_backend(torch.device(device), backend_type, backend)
    return group


def _registered(group: Any) -> bool:
    try:
        return bool(group.group_name) and group_named(group.group_name) is group
    except (RuntimeError, LookupError, ValueError):
        return False


def group_named(name: Any) -> Any:
    """The process group that torch knows by a name."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)
