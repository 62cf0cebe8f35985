"""How much a core holds, counted over everything that it can reach."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

_OURS = ("broker.", "worker.", "trainer_client.")
#: Values and rules, which do not grow: what a message holds is bounded by its limits.
_VALUES = ("broker.protocol.messages", "broker.protocol.wire", "broker.protocol.limits")

#: What a core gave back for its last event; and the broker's histograms, one set for each model
#: that it ever had, with a ring of fixed length.
_PASSING = ("_actions", "measures")


def footprint(core: Any) -> dict[str, int]:
    """Attribute -> items in it and in all that hangs on it; each object counts once.

    Private containers count as well, and those of a feature that does not exist yet: nothing that
    grows has to be listed here.
    """
    seen = {id(core)}
    held = {name: value for name, value in vars(core).items() if name not in _PASSING}
    return {name: _items(value, seen) for name, value in held.items()}


def _items(value: Any, seen: set[int]) -> int:
    total = 0
    stack = [value]
    while stack:
        item = stack.pop()
        inside = _inside(item)
        if inside is None or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, (dict, list, set, deque)):
            total += len(item)
        stack.extend(inside)
    return total


def _inside(item: Any) -> Iterable[Any] | None:
    if isinstance(item, dict):
        return [*item.keys(), *item.values()]
    if isinstance(item, (list, set, deque, tuple)):
        return item
    kind = type(item)
    if not kind.__module__.startswith(_OURS) or kind.__module__ in _VALUES:
        return None
    slots = (getattr(item, name, None) for name in getattr(kind, "__slots__", ()))
    return [*getattr(item, "__dict__", {}).values(), *slots]
