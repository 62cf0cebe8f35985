"""A worker's two threads beside the sockets: one runs the target, one makes the answers."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from broker.protocol import Limits
from worker.answers import Answerer, Work
from worker.core import Compute, Computed, ComputeTogether, Forget, Learn, TargetFree
from worker.metrics import WorkerMeasures

_logger = logging.getLogger("draftmq.worker")

#: What the target's thread is given to do, in order.
Task = Compute | ComputeTogether | Learn | Forget


class Pipeline:
    """While the answer to one request is copied, hashed and encoded, the target runs the next.

    How many answers may be in the making is the core's to say (its ``max_staged``): it gives no
    work while there are too many, so neither queue here grows beyond that. ``post`` takes the
    core's events, ``failed`` is told when a thread breaks, ``limits`` says how large a reply may
    be.
    """

    def __init__(
        self,
        answerer: Answerer,
        measures: WorkerMeasures,
        limits: Callable[[], Limits],
        post: Callable[[TargetFree | Computed], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._answerer = answerer
        self._measures = measures
        self._limits = limits
        self._post = post
        self._failed = failed
        #: None ends the thread
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._staged: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, args=(name, loop), name=name, daemon=True)
            for name, loop in (("draftmq-target", self._compute), ("draftmq-encode", self._encode))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def do(self, task: Task) -> None:
        """Queue a task, from any thread."""
        self._tasks.put(task)

    def stop(self) -> None:
        """Return when both threads have ended; a running forward is waited for."""
        self._tasks.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _run(self, name: str, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as error:
            _logger.exception("thread_failed", extra={"fields": {"thread": name}})
            self._failed(error)
        finally:
            self._staged.put(None)

    def _compute(self) -> None:
        while (task := self._tasks.get()) is not None:
            if isinstance(task, Learn):
                self._learn(task)
            elif isinstance(task, Forget):
                self._answerer.forget(task.mapping_id)
            else:
                self._forward(task.parts if isinstance(task, ComputeTogether) else (task,))

    def _forward(self, parts: tuple[Compute, ...]) -> None:
        now = time.monotonic()
        works = [Work(part.packet, now - part.received_at) for part in parts]
        self._answerer.compute(works)
        self._measures.computed += len(works)
        for work in works:
            self._measures.fp8_errors |= work.fp8_errors
        self._post(TargetFree())
        for work in works:
            self._staged.put(work)

    def _encode(self) -> None:
        while (work := self._staged.get()) is not None:
            answer = self._answerer.finish(work, self._limits())
            self._measures.answered(work.packet, answer, work.waited_s, work.compute_s)
            self._post(Computed(work.request.id, answer))
            del work, answer  # else the next would wait beside this one's memory

    def _learn(self, task: Learn) -> None:
        try:
            self._answerer.learn(task.packet)
        except Exception as error:  # requests that name it are answered with what is wrong
            _logger.warning("bad_mapping", extra={"fields": {"error": str(error)}})
