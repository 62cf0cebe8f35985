"""What happened between two looks at a broker: rates, and how long requests waited of late."""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]
_RATED = ("requests", "replies", "failures")
_TIMES = ("queue_wait_s", "service_s", "compute_s")


def rates(before: Values | None, after: Values) -> Values | None:
    """Rates a second and mean times from two ``/status``; None where they cannot be compared.

    Times are None where nothing happened. ``workers`` and ``clients`` have each one's answers a
    second.
    """
    if before is None or before["broker"] != after["broker"]:
        return None
    seconds = after["now_s"] - before["now_s"]
    if seconds <= 0:
        return None

    def rate(new: float, old: float) -> float:
        return max(0.0, new - old) / seconds

    found: Values = {
        f"{name}_per_s": rate(after["counters"][name], before["counters"][name]) for name in _RATED
    }
    found["tokens_per_s"] = rate(_tokens(after), _tokens(before))
    for direction in ("received", "sent"):
        found[f"{direction}_bytes_per_s"] = rate(
            _bytes(after, direction), _bytes(before, direction)
        )
    found |= {name: _mean(before, after, name) for name in _TIMES}
    for kind in ("worker", "client"):
        old = {peer[kind]: peer["answered"] for peer in before[f"{kind}s"]}
        found[f"{kind}s"] = {
            peer[kind]: rate(peer["answered"], old.get(peer[kind], 0)) for peer in after[f"{kind}s"]
        }
    return found | {"seconds": seconds}


def _tokens(seen: Values) -> int:
    return sum(measured["tokens"] for measured in seen["measures"].values())


def _bytes(seen: Values, direction: str) -> int:
    return sum(counts[direction] for counts in seen["bytes"].values())


def _mean(before: Values, after: Values, name: str) -> float | None:
    def total(seen: Values, what: str) -> float:
        return sum(measured[name][what] for measured in seen["measures"].values())

    count = total(after, "count") - total(before, "count")
    return (total(after, "sum") - total(before, "sum")) / count if count > 0 else None
