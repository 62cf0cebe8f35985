"""SIGTERM and SIGINT for a training process: a checkpoint first, then the end.

A signal must not strike within an optimizer step. Within :meth:`Stop.shielded` it is only noted,
and ends a wait for supervision, which may take minutes; outside, before there is anything to lose,
it ends whatever the process does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

#: Signals within this time are one wish: torchrun and Slurm hand on to ranks what a terminal or
#: ``scancel`` has sent to them already.
ONE_WISH_S = 5.0


class Stopped(BaseException):
    """A signal ended a wait. No ``Exception``, so that no handler of errors takes it for one."""


class Stop:
    """Whether this process was asked to stop, and by what."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        #: the signal's name; "" as long as none came
        self.by = ""
        self._clock = clock
        self._at = 0.0
        self._interruptible = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear SIGTERM and SIGINT, in the main thread only.

        One that comes later than ``ONE_WISH_S`` after the first ends the process at once.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._heard) for number in _SIGNALS}
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """What a signal does not end: it is seen afterwards, in ``by``."""
        before, self._interruptible = self._interruptible, False
        try:
            yield
        finally:
            self._interruptible = before

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A wait that a signal ends with :class:`Stopped`."""
        before, self._interruptible = self._interruptible, True
        try:
            if self.by:
                raise Stopped
            yield
        finally:
            self._interruptible = before

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.by:
            if self._clock() - self._at >= ONE_WISH_S:
                os._exit(128 + number)  # what a shell says of a process that the signal killed
            return
        self.by, self._at = signal.Signals(number).name, self._clock()
        if self._interruptible:
            raise Stopped


_SIGNALS: tuple[Any, ...] = (signal.SIGTERM, signal.SIGINT)
