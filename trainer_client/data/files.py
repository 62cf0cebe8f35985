"""Files to records: the format is what the content is, whatever the name says.

JSON with one object a line, an array of objects, one object alone, or plain text; plain, ``.gz`` or
``.xz``. What cannot be read is an error with file and line.
"""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer_client.errors import DataError

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
#: As much as tells a format.
_HEAD = 1 << 16


class BadLine(DataError):  # noqa: N818 - what it is about
    """One record cannot be used; ``reason`` is the same for all of its kind."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class Record:
    """One record, from ``origin`` (file:line, or file#number); text has no structure."""

    origin: str
    value: Any


def read_records(path: Path) -> Iterator[Record | BadLine]:
    """The records of a file, in order; what is no JSON where JSON is wanted comes as BadLine.

    Raises :class:`DataError` for a file that cannot be read.
    """
    kind = _kind(path)
    if kind == "text":
        text = "".join(line for _, line in _lines(path))
        if text.strip():
            yield Record(str(path), text)
    elif kind == "lines":
        for number, line in _lines(path):
            if line.strip():
                yield _parsed(f"{path}:{number}", line)
    else:
        whole = _parsed(str(path), "".join(line for _, line in _lines(path)))
        if isinstance(whole, BadLine):
            raise whole
        values = whole.value if isinstance(whole.value, list) else [whole.value]
        for number, value in enumerate(values, start=1):
            yield Record(f"{path}#{number}", value)


def _kind(path: Path) -> str:
    """``text``, ``lines`` (an object a line) or ``whole`` (one JSON value)."""
    named = path.name.lower().removesuffix(".gz").removesuffix(".xz")
    says_json = named.endswith((".json", ".jsonl", ".ndjson"))
    head = ""
    for _, line in _lines(path):
        head += line
        if len(head) >= _HEAD:
            break
    lines = [line for line in head.splitlines() if line.strip()]
    first = lines[0].lstrip() if lines else ""
    if first.startswith("{") and (_is_json(first) or not _begins_object(lines)):
        return "lines" if says_json or _is_json(first) else "text"
    if first.startswith(("{", "[")) and (says_json or _begins_json(lines)):
        return "whole"
    return "lines" if says_json else "text"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _begins_object(lines: list[str]) -> bool:
    """Whether an object begins on the first line and goes on behind it."""
    return len(lines) > 1 and lines[0].strip() == "{" and lines[1].lstrip().startswith('"')


def _begins_json(lines: list[str]) -> bool:
    """Whether text that begins with a bracket goes on as JSON does."""
    rest = "".join(lines)[1:].lstrip()
    return rest.startswith(("{", '"', "]")) or _begins_object(lines)


def _parsed(origin: str, text: str) -> Record | BadLine:
    try:
        return Record(origin, json.loads(text))
    except (ValueError, RecursionError) as error:
        reason = "not JSON"
        return BadLine(f"{origin} is not JSON: {error}; one object a line is wanted", reason)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, from 1; a byte order mark is no part of the first."""
    number = 0
    opener = _OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            for number, octets in enumerate(file, start=1):
                line = octets.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, line.replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number} is not UTF-8: {error.reason}; convert it") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
