"""What an engine's processes keep in /dev/shm, to be taken away where they are killed.

Rows of ours have no name there, but vLLM's own processes share some memory by name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_SHARED = "/dev/shm/"


def shared_by_children() -> frozenset[str]:
    """Paths in /dev/shm that processes below this one have mapped."""
    return frozenset(
        path for pid in descendants(os.getpid()) for path in _mapped(pid) if _is_shared(path)
    )


def remove(paths: Iterable[str]) -> None:
    """Take away what is left of them."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _is_shared(path: str) -> bool:
    return path.startswith(_SHARED) and not path.endswith(" (deleted)")


def _mapped(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):  # it may have ended
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            yield line.split(maxsplit=5)[5] if line.count(" ") >= 5 and "/" in line else ""


def descendants(pid: int) -> Iterator[int]:
    """The processes below one, each before its own."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                yield int(child)
                yield from descendants(int(child))
