"""What is raised when an invariant does not hold."""

from __future__ import annotations


class InvariantError(AssertionError):
    """An invariant does not hold. ``name`` stays the same while a schedule is shrunk."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name = name


def require(holds: object, name: str, *text: object) -> None:
    if not holds:
        raise InvariantError(name, " ".join(map(str, text)))
