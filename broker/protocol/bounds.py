"""How large what a peer says of itself may be: types of fields, each with its bound.

A bound is checked where a message is made and where it is read, so that nothing behind has to ask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from broker.protocol.limits import MAX_NAME_BYTES, MAX_TEXT_CHARACTERS


class BoundError(ValueError):
    """A value is out of its bounds; the text says both numbers."""


@dataclass(frozen=True)
class Bound:
    """What a value of a bounded type must be, in words, and the check that gives it back."""

    words: str
    of: type
    check: Callable[[Any], Any]
    #: of numbers
    least: float = 0
    most: float = 0


def _short(limit: int) -> Bound:
    def check(value: str) -> str:
        # a character has four bytes at the most, so most names need not be encoded to be counted
        if 4 * len(value) > limit and (nbytes := len(value.encode(errors="replace"))) > limit:
            raise BoundError(f"has {nbytes} bytes, the limit is {limit}")
        return value

    return Bound(f"at most {limit} bytes", str, check)


def _between(least: float, most: float) -> Bound:
    def check(value: float) -> float:
        if not least <= value <= most:
            raise BoundError(f"is {value!r}, allowed are {least} to {most}")
        return value

    return Bound(f"{least:g} to {most:g}", type(least), check, least, most)


def plain_text(text: str) -> str:
    """A text for people as it may travel: valid UTF-8, and cut where it is too long."""
    if len(text) > MAX_TEXT_CHARACTERS:
        text = text[: MAX_TEXT_CHARACTERS - 1] + "…"
    return text if text.isascii() else text.encode(errors="replace").decode()


#: Names of peers, models, jobs, mappings, codes.
Name = Annotated[str, _short(MAX_NAME_BYTES)]
#: What is made of several names, a path, or a list in one string.
LongName = Annotated[str, _short(16 * MAX_NAME_BYTES)]
#: Sentences for people; a longer one is cut, not refused.
Text = Annotated[str, Bound(f"cut after {MAX_TEXT_CHARACTERS} characters", str, plain_text)]
#: How many of something, or which.
Count = Annotated[int, _between(0, (1 << 63) - 1)]
#: Tokens, steps and the like, far beyond what anybody has.
Tokens = Annotated[int, _between(0, 1 << 40)]
Step = Annotated[int, _between(-(1 << 62), 1 << 62)]
#: Of a vocabulary, a hidden state, a stack of layers.
Size = Annotated[int, _between(0, 1 << 31)]
#: Of a decoder layer, -1 for the embeddings below the first.
Layer = Annotated[int, _between(-1, 1 << 20)]
VocabSize = Annotated[int, _between(1, 1 << 31)]
Port = Annotated[int, _between(1, 65535)]
#: Requests that a worker holds at once.
Credits = Annotated[int, _between(0, 4096)]
Rank = Annotated[int, _between(-1, 1 << 31)]
Seconds = Annotated[float, _between(0.0, 1e9)]
#: What everyone shall do so often must not be never, and not always.
Interval = Annotated[float, _between(1e-3, 1e6)]
