"""SIGTERM and SIGINT for a training process: a checkpoint first, then the end.

A signal must not strike within an optimizer step. While the trainer waits for supervision, which
may take minutes, it ends the wait at once; elsewhere it is seen after the step.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Stopped(BaseException):
    """A signal ended a wait. No ``Exception``, so that no handler of errors takes it for one."""


class Stop:
    """Whether this process was asked to stop, and by what."""

    def __init__(self) -> None:
        #: the signal's name; "" as long as none came
        self.by = ""
        self._interruptible = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear SIGTERM and SIGINT; a second one has its usual effect. In the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._heard) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A wait that a signal ends with :class:`Stopped`."""
        self._interruptible = True
        try:
            if self.by:
                raise Stopped
            yield
        finally:
            self._interruptible = False

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.by:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.by = signal.Signals(number).name
        if self._interruptible:
            raise Stopped


_SIGNALS: tuple[Any, ...] = (signal.SIGTERM, signal.SIGINT)
