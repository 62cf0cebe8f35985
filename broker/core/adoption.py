"""Requests that workers still run when they reconnect, or come to a restarted broker."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from broker.core.dispatch import Dispatcher
from broker.core.ledger import Ledger
from broker.core.places import Place
from broker.core.pool import Pool
from broker.core.state import Entry, WorkerSession
from broker.protocol import messages as m

#: Peers that were there before a restart are back after so many times the liveness limit.
_RETURN_LIVENESSES = 6


class Adoption:
    """Takes over requests that a worker says it runs already, as far as it can be believed."""

    def __init__(
        self,
        ledger: Ledger,
        dispatcher: Dispatcher,
        pool_of: Callable[[Entry], Pool | None],
        drop: Callable[..., None],
    ) -> None:
        self._ledger = ledger
        self._dispatcher = dispatcher
        self._pool_of = pool_of
        self._drop = drop

    def adopt(
        self,
        worker: WorkerSession,
        held: Sequence[m.RequestId],
        had: Collection[m.RequestId],
        now: float,
    ) -> None:
        """Take over what a worker still works on from before a reconnect or a restart of ours.

        What it says is believed where this broker gave it that (``had``), and within its credits
        for as long after a beginning of ours as peers take to come back. Of the rest its answers
        are not awaited.
        """
        ledger = self._ledger
        assert ledger.began_at is not None
        new = now - ledger.began_at <= _RETURN_LIVENESSES * ledger.config.liveness_s
        unknown = worker.credits - len(had) if new else 0
        adopted = []
        for request_id in held:
            entry = ledger.entries.get(request_id)
            worker.running[request_id] = now  # its own credits are what it costs
            if request_id not in had:
                if unknown <= 0 or (entry is not None and not self._may_adopt(entry, worker)):
                    continue
                unknown -= 1
            is_new = entry is None and request_id not in ledger.answers
            if is_new:
                request = m.Request(request_id, "generate", worker.model, 0, 0, "", "", 0.0, ())
                entry = ledger.entries[request_id] = Entry(request, None, "", now, math.inf)
            if entry is not None and entry.passing is None:
                if entry.place is not Place.RUNNING:
                    ledger.places.move(entry, Place.RUNNING, f"on worker {worker.id}", now)
                if is_new:
                    self._drop_unasked(entry, now + ledger.config.held_answer_s)
                if entry.packet is None:
                    ledger.request_room.free(entry.id)
                entry.pool = worker.offer
                entry.workers.add(worker.id)
                entry.adopted = True
                adopted.append(entry)
        self._dispatcher.watch_all(adopted, worker, now, unsure=True)

    def _drop_unasked(self, entry: Entry, due: float) -> None:
        """Set a timer that forgets an adopted request which no client has asked for by then."""

        def check(now: float) -> None:
            if entry.expires_at == math.inf:
                self._drop(entry, now, cancel=True)

        entry.timer = self._ledger.at(due, check)

    def _may_adopt(self, entry: Entry, worker: WorkerSession) -> bool:
        """Whether the worker could have this request, as it says."""
        if entry.under_way or entry.packet is None:
            return False
        pool = self._pool_of(entry)
        return pool is not None and pool.description.offer == worker.offer

    def check(self, entry: Entry, now: float) -> None:
        """Look again at an adopted request once its client has asked: its worker may be unable to
        serve it, or may have it and never answer.
        """
        ledger, request = self._ledger, entry.request
        offered = ledger.pools.get(entry.pool)
        fits = offered is not None and (
            request.offer in ("", entry.pool) and request.model in ("", offered.description.model)
        )
        for worker_id in sorted(entry.workers):
            if fits:
                self._dispatcher.watch(entry, ledger.workers[worker_id], now, unsure=True)
            else:
                self._dispatcher.end_run(ledger.workers[worker_id], entry.id)
                ledger.pools[entry.pool].choice.put(ledger.workers[worker_id])
                entry.workers.discard(worker_id)
        if not fits:
            entry.pool = ""
