"""Chance that replays: one stream of numbers for each thing that needs luck."""

from __future__ import annotations

import hashlib

_MASK = (1 << 64) - 1


class Stream:
    """Random numbers that depend on their key alone (splitmix64, Steele et al., OOPSLA 2014).

    Every link has a stream of its own, so taking an operation out of a schedule, as shrinking does,
    leaves the luck of all the others as it was.
    """

    __slots__ = ("_state",)

    def __init__(self, *key: object) -> None:
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        self._state = int.from_bytes(digest, "little")

    def random(self) -> float:
        """The next number in [0, 1)."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return (z ^ (z >> 31)) / 2**64

    def below(self, n: int) -> int:
        """The next integer in [0, n)."""
        return int(self.random() * n)
