"""One end of one channel at work: its core, its thread, and the backend of the present epoch."""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from broker.log_line import Log
from broker.logs import log
from worker.direct.backend import Backend, TransferError
from worker.direct.channel import (
    Channel,
    ChannelState,
    Close,
    Connect,
    Drop,
    Event,
    Failed,
    Joined,
    Moved,
    Receive,
    Reject,
    Tick,
)

_runners: weakref.WeakSet[Runner] = weakref.WeakSet()
#: A channel at rest looks so often whether the other end is still there.
_LOOK_S = 0.5


@dataclass(frozen=True)
class Move:
    """Something to be done with the backend of an epoch; ``failed`` is told if it is not done."""

    epoch: int
    run: Callable[[Backend], None]
    failed: Callable[[str], None]


class Runner:
    """Runs a :class:`Channel`. Events come from any thread; tensors move in this one's own.

    ``connect`` builds the backend of the present epoch. ``receive`` and ``reject`` carry out the
    core's actions of these names and are the client's; the worker calls :meth:`move`.
    """

    def __init__(
        self,
        core: Channel,
        connect: Callable[[int, threading.Event], Backend],
        logger: logging.Logger,
        receive: Callable[[Receive], None] = lambda action: None,
        reject: Callable[[Reject], None] = lambda action: None,
    ) -> None:
        self.core = core
        self.used_at = time.monotonic()
        self._connect = connect
        self._logger = logger
        self._receive = receive
        self._reject = reject
        self._lock = threading.Lock()
        self._leaving = threading.Event()
        self._jobs: queue.SimpleQueue[Connect | Drop | Move | None] = queue.SimpleQueue()
        self._backend: Backend | None = None
        #: epoch of ``_backend``, or of the last one
        self._epoch = 0
        self._thread = threading.Thread(target=self._run, name="draftmq-channel", daemon=True)
        self._thread.start()
        _runners.add(self)

    def tell(self, event: Event) -> None:
        """Hand an event to the core and do what it asks for."""
        with self._lock:
            actions = self.core.handle(event, time.monotonic())
            backend = self._backend
        for action in actions:
            if isinstance(action, Log):
                log(self._logger, action.level, action.event, action.fields)
            elif isinstance(action, Connect):
                self._jobs.put(action)
            elif isinstance(action, Drop) and backend is not None:
                backend.interrupt()
                self._jobs.put(action)
            elif isinstance(action, Receive):
                self._receive(action)
            elif isinstance(action, Reject):
                self._reject(action)

    def take_seq(self) -> tuple[int, int] | None:
        """``(epoch, seq)`` of a transfer that begins now; None when the channel is not ready."""
        with self._lock:
            if self.core.state is not ChannelState.READY:
                return None
            return self.core.epoch, self.core.take_seq()

    def move(self, move: Move) -> None:
        """Have tensors moved, after all that was asked for before."""
        self._jobs.put(move)

    def close(self, why: str) -> None:
        """Free whoever waits, and have the thread end; :meth:`join` waits for that."""
        self._leaving.set()
        self.tell(Close(self.core.epoch, why))
        self._jobs.put(None)

    def join(self) -> None:
        """Wait until the thread has ended, at most as long as a connection may take."""
        self._thread.join()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    # -- in the channel's own thread --------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._next()) is not None:
            if isinstance(job, Connect):
                self._join(job.epoch)
            elif isinstance(job, Drop):
                self._let_go(job.epoch)
            else:
                self._do(job)
        while not self._jobs.empty():
            if isinstance(job := self._jobs.get(), Move):
                job.failed("the channel is closed")
        self._let_go(self._epoch)

    def _next(self) -> Connect | Drop | Move | None:
        while True:
            try:
                return self._jobs.get(timeout=_LOOK_S)
            except queue.Empty:
                self.tell(Tick(self.core.epoch))
                if self._backend is not None and self._backend.gone:
                    self._let_go(self._epoch)
                    self.tell(Failed(self._epoch, "the other end is gone", at_rest=True))

    def _join(self, epoch: int) -> None:
        self._let_go(self._epoch)
        if epoch != self.core.epoch or self._leaving.is_set():
            return
        try:
            backend = self._connect(epoch, self._leaving)
        except Exception as error:
            self._failed(epoch, error)
            return
        self._backend, self._epoch = backend, epoch
        self.tell(Joined(epoch))

    def _let_go(self, epoch: int) -> None:
        if epoch == self._epoch and self._backend is not None:
            self._backend.close()
            self._backend = None

    def _do(self, move: Move) -> None:
        backend = self._backend
        if backend is None or move.epoch != self._epoch:
            move.failed(self.core.why or f"epoch {move.epoch} is over")
            return
        self.used_at = time.monotonic()
        try:
            move.run(backend)
        except Exception as error:
            self._let_go(move.epoch)
            move.failed(str(error))
            self._failed(move.epoch, error)
        else:
            self.tell(Moved(move.epoch))
        self.used_at = time.monotonic()

    def _failed(self, epoch: int, error: Exception) -> None:
        if not isinstance(error, TransferError):
            self._logger.exception("channel_error", exc_info=error)
        self.tell(Failed(epoch, str(error)))

    def __repr__(self) -> str:
        return repr(self.core)

    def _abandon(self) -> None:
        """In a forked child: never touch the process group, and never let go of it.

        The child has none of its threads, and shares with the parent the epoll that they wait on,
        out of which closing or freeing it here would take the parent's connections.
        """
        if self._backend is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._backend))
            self._backend = None


class Ending:
    """Runners that are closed, and perhaps still free what they held."""

    def __init__(self) -> None:
        self._runners: list[Runner] = []

    def close(self, runner: Runner, why: str) -> None:
        runner.close(why)
        self._runners = [other for other in self._runners if other.running] + [runner]

    def join(self) -> None:
        """Wait for all of them, as :meth:`Runner.join` does."""
        for runner in self._runners:
            runner.join()


def _abandon_all() -> None:
    for runner in list(_runners):
        runner._abandon()


os.register_at_fork(after_in_child=_abandon_all)
