"""The Mooncake store over TCP: what others move hidden states with."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

from tests.bench.lines import Progress
from tests.bench.peers.driver import Driver
from tests.bench.peers.venv import python_of

NAME = "Mooncake store, TCP"
_VENV = Path(__file__).parents[3] / "build" / "peers" / "mooncake"
_PACKAGE = "mooncake-transfer-engine-non-cuda==0.3.13.post1"
_INSTALLS = ([_PACKAGE, "msgpack", "aiohttp", "requests", "numpy"],)
_DRIVER = Path(__file__).with_name("mooncake_driver.py")
#: Which it links to, also where there is no such network.
_LIBRARY = "libibverbs.so.1"


class Mooncake(Driver):
    """A store's master, one who puts and one who gets."""

    def __init__(self, python: Path) -> None:
        super().__init__("Mooncake", python, _DRIVER)

    def take(self, nbytes: int, replies: int, depth: int) -> float:
        """Seconds for each of so many objects, from asking for it until it is here.

        Each is put when it is asked for, and ``depth`` are asked for at once.
        """
        return float(self.ask("take", nbytes=nbytes, replies=replies, depth=depth)["seconds"])


@contextlib.contextmanager
def mooncake(largest: int, progress: Progress, *, quick: bool) -> Iterator[Mooncake | None]:
    """The store, for objects of up to ``largest`` bytes.

    None where it is to be ``quick``, and where the store cannot be had or does not come up, which
    ``progress`` is told.
    """
    python = None
    if not quick and _library_is_here(progress):
        python = python_of(_VENV, _INSTALLS, progress)
    if python is None:
        yield None
        return
    with Mooncake(python) as started:
        try:
            started.ask("start", largest=largest)
            up = True
        except RuntimeError as error:
            progress(f"mooncake cannot be measured here: {error}")
            up = False
        yield started if up else None


def _library_is_here(progress: Progress) -> bool:
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError:
        progress(
            f"mooncake cannot be measured here: {_LIBRARY} is missing; install it (on Debian: "
            "apt-get install libibverbs1)"
        )
        return False
    return True
