"""Numbers that people set: each is finite and in its range, or is refused by its name."""

from __future__ import annotations

import math


def check_numbers(settings: object, *, above_0: str = "", not_negative: str = "") -> None:
    """Look at the attributes that are named, with blanks between the names.

    Raises :class:`ValueError` for the first that is out of its range, infinite or NaN (which no
    comparison would refuse).
    """
    for name in above_0.split():
        _refuse_unless(getattr(settings, name) > 0, settings, name, "must be above 0")
    for name in not_negative.split():
        _refuse_unless(getattr(settings, name) >= 0, settings, name, "must not be negative")


def _refuse_unless(in_range: bool, settings: object, name: str, rule: str) -> None:
    value = getattr(settings, name)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if not in_range:
        raise ValueError(f"{name} {rule}, got {value}")
