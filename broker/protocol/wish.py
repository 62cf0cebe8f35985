"""What a trainer wants to know of a target, as one canonical string.

A request carries it in ``encoding``, the reply echoes it, the client compares the two, and the
broker does not look inside. Its parts are separated by ``;`` and come in this order:

============= ====================================================================================
``layers=``   ids of decoder layers, ascending: their outputs, not normed; -1 for the embeddings
``last``      the last hidden state after the final norm: what the target's head multiplies
``probs=all`` probabilities over the whole vocab mapping
``topk=K``    of these the K largest
``states=``   ``fp8``: the layers travel as float8_e4m3fn, with a scale for each token and layer
``last=``     ``fp8``, in place of ``last``: the same for the last hidden state
``at=loss``   ``last``, ``probs`` and ``topk`` at those positions only whose loss mask is 1
``rows=A-B``  the positions A <= t < B are sent, and no others (the target sees all)
============= ====================================================================================

``probs``, ``hidden`` and ``topk`` alone are names of three wishes: EAGLE-3's supervision over the
worker's own aux layers, moved left by one, with ``position_mask``. A name takes ``rows``, and
nothing else.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

#: The names, which are also what a worker says that it offers.
NAMES = ("probs", "hidden", "topk")
#: A number of at most 10 digits, which nobody writes in two ways.
_NUMBER = r"(?:0|[1-9][0-9]{0,9})"


class WishError(ValueError):
    """A text is no wish; says which part, and what may be written."""


@dataclass(frozen=True)
class Wish:
    """What a reply shall have. ``str`` is its canonical text.

    Raises :class:`WishError` where the parts do not fit together.
    """

    #: one of :data:`NAMES`; then nothing else is said but ``rows``
    name: str = ""
    layers: tuple[int, ...] = ()
    last: bool = False
    probs: bool = False
    topk: int = 0
    fp8_states: bool = False
    fp8_last: bool = False
    at_loss: bool = False
    #: the first position and the one behind the last; None: all
    rows: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and not 0 <= self.rows[0] < self.rows[1]:
            raise WishError(f"rows={self.rows[0]}-{self.rows[1]} is empty; write rows=A-B, A < B")
        if self.name:
            self._check_name()
        else:
            self._check_parts()

    def _check_name(self) -> None:
        if self.name not in NAMES:
            raise WishError(f"{self.name!r} is no name of a wish; choose {', '.join(NAMES)}")
        said = [part for part in self._parts() if not part.startswith("rows=")]
        if said != [self.name]:
            raise WishError(f"to the name {self.name!r} only rows=A-B is added, got {said[1:]}")

    def _check_parts(self) -> None:
        if list(self.layers) != sorted(set(self.layers)) or min(self.layers, default=0) < -1:
            right = ",".join(map(str, sorted(set(self.layers))))
            raise WishError(f"layers must be distinct and ascend, from -1 on; write layers={right}")
        if not (self.layers or self.last or self.over_vocabulary):
            raise WishError("nothing is asked for; say layers=..., last, probs=all or topk=K")
        if self.probs and self.topk:
            raise WishError("probs and topk are asked for, and one has what the other has; choose")
        if self.topk < 0:
            raise WishError(f"topk={self.topk}: K is at least 1")
        if self.fp8_states and not self.layers:
            raise WishError("states=fp8 speaks of layers, and none are asked for")
        if self.fp8_last and not self.last:
            raise WishError("last=fp8 speaks of the last hidden state, which is not asked for")
        if self.at_loss and not (self.last or self.over_vocabulary):
            raise WishError(
                "at=loss chooses positions of last, probs or topk, and none is asked for; layers "
                "come for all positions"
            )

    @property
    def over_vocabulary(self) -> bool:
        """Whether the head is run, and a vocab mapping needed."""
        return bool(self.name or self.probs or self.topk)

    @property
    def has_last(self) -> bool:
        """Whether the reply has the last hidden state, which the trainer multiplies by the head."""
        return self.last or self.name == "hidden"

    @property
    def offered_as(self) -> str:
        """The name that a worker must offer for it; nothing where every worker has it."""
        return self.name or ("hidden" if self.last else "")

    @property
    def lossy(self) -> bool:
        """Whether something of it travels as fp8."""
        return self.fp8_states or self.fp8_last

    def exact(self) -> Wish:
        """The same with everything in the target's dtype."""
        return replace(self, fp8_states=False, fp8_last=False)

    def within(self, first: int, end: int) -> Wish:
        """The same for the positions ``first <= t < end`` only."""
        return replace(self, rows=(first, end))

    def __str__(self) -> str:
        return ";".join(self._parts())

    def _parts(self) -> list[str]:
        parts = {
            self.name: bool(self.name),
            f"layers={','.join(map(str, self.layers))}": bool(self.layers),
            "last": self.last and not self.fp8_last,
            "last=fp8": self.fp8_last,
            "probs=all": self.probs,
            f"topk={self.topk}": bool(self.topk),
            "states=fp8": self.fp8_states,
            "at=loss": self.at_loss,
            f"rows={self.rows[0]}-{self.rows[1]}" if self.rows else "": self.rows is not None,
        }
        return [part for part, said in parts.items() if said]


def _layers(value: str) -> dict[str, Any]:
    return {"layers": tuple(int(each) for each in value.split(","))}


def _rows(value: str) -> dict[str, Any]:
    first, end = value.split("-")
    return {"rows": (int(first), int(end))}


#: part -> what its value must be | an example | the fields that it sets
_PARTS: dict[str, tuple[str, str, Callable[[str], dict[str, Any]]]] = {
    "layers": (rf"(?:-1|{_NUMBER})(?:,{_NUMBER})*", "layers=1,17,32", _layers),
    "last": (
        r"|target|fp8",
        "last or last=fp8",
        lambda value: {"last": True, "fp8_last": value == "fp8"},
    ),
    "probs": (r"|all", "probs=all", lambda value: {"probs": True}),
    "topk": (r"[1-9][0-9]{0,9}", "topk=256", lambda value: {"topk": int(value)}),
    "states": (
        r"target|fp8",
        "states=fp8",
        lambda value: {"fp8_states": value == "fp8"},
    ),
    "at": (r"all|loss", "at=loss", lambda value: {"at_loss": value == "loss"}),
    "rows": (rf"{_NUMBER}-{_NUMBER}", "rows=4096-8192", _rows),
}


@functools.lru_cache(maxsize=256)
def parse_wish(text: str) -> Wish:
    """The wish that a text says, its parts in any order, defaults said or not.

    Raises :class:`WishError` that names the part.
    """
    fields: dict[str, Any] = {}
    parts = [part.strip() for part in text.split(";")]
    if parts[0] in NAMES and all(part.startswith("rows=") for part in parts[1:]):
        fields["name"] = parts.pop(0)
    seen = set()
    for part in parts:
        key, equals, value = part.partition("=")
        if key not in _PARTS:
            raise _refused(text, f"{_cut(part)!r} is no part of one")
        wanted, example, read = _PARTS[key]
        if not re.fullmatch(wanted, value) or (equals and not value):
            raise _refused(text, f"{_cut(part)!r} is not how {key} is said; write {example}")
        if key in seen:
            raise _refused(text, f"{key} is said twice")
        seen.add(key)
        fields |= read(value)
    try:
        return Wish(**fields)
    except WishError as error:
        raise _refused(text, str(error)) from None


def _refused(text: str, why: str) -> WishError:
    parts = ", ".join(example for _, example, _ in _PARTS.values())
    return WishError(
        f"{_cut(text)!r} is no wish of supervision: {why}. A wish is {', '.join(NAMES)}, or parts "
        f"with ; between them: {parts}"
    )


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
