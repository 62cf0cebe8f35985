"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: ``error`` breaks the draft in some engine, ``warning`` may."""

    severity: str
    text: str


def error(text: str) -> Finding:
    """A finding that breaks the draft in some engine."""
    return Finding("error", text)


def warning(text: str) -> Finding:
    """A finding that may break it, or an older engine."""
    return Finding("warning", text)
