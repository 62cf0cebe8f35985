"""Which queued request goes to which worker, and which must wait for something else first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import cast

from broker.core.events import Side
from broker.core.ledger import Ledger
from broker.core.places import Place
from broker.core.pool import Pool
from broker.core.schedule import expected_finish
from broker.core.state import Entry, WorkerSession
from broker.core.timers import Timer
from broker.protocol import Packet, encode
from broker.protocol import messages as m
from broker.protocol.messages import RequestId

_Call = Callable[[float], None]

#: What a request is expected to take while no worker of the pool has answered anything: a first
#: forward may compile for as long.
_UNKNOWN_S = 20.0
#: Where nothing is hedged, a request is overdue after so many times its expected time.
_LATE = 3.0
#: A queue that waits for a better worker is looked at again at least this often.
_LOOK_S = 5.0


class Dispatcher:
    """Keeps the requests of each pool where they have to wait, and gives them to workers.

    A request waits for its mapping, in its pool's queue, or for room for its reply.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        #: has the requests looked at that wait for room
        self._look: Timer | None = None

    def take(self, entry: Entry, pool: Pool, now: float, *, again: bool = False) -> None:
        """Have this pool serve the request; ``again`` puts it before all new ones."""
        entry.pool = pool.description.offer
        mapping = entry.request.mapping_id
        if mapping and not self._can_tell(mapping, pool):
            self._want_mapping(entry, now)
            return
        self._ledger.places.move(entry, Place.QUEUED, "", now, again=again)
        self.dispatch(pool, now)

    def _want_mapping(self, entry: Entry, now: float) -> None:
        mapping = entry.request.mapping_id
        why = f"vocab mapping {mapping} has not come from any trainer"
        self._ledger.places.move(entry, Place.MAPPING, why, now)
        if (client := self._ledger.clients.get(entry.client)) is not None:
            self._ledger.answer(client, m.MappingWanted(mapping))

    def dispatch(self, pool: Pool, now: float) -> None:
        """Give queued requests to workers with free credits."""
        while len(pool.queue) and len(pool.choice.free()):
            chosen = self._choose(pool, now)
            if chosen is None:
                return
            entry, worker, is_trial = chosen
            if not self._must_wait(entry, worker, pool, now):
                pool.queue.take(entry)
                self._assign(entry, worker, now, is_trial=is_trial)

    def _choose(self, pool: Pool, now: float) -> tuple[Entry, WorkerSession, bool] | None:
        """The next request, who gets it, and whether that is a trial of a worker that looks slow.

        None: the requests wait for a better worker, and a timer is set to look again.
        """
        queue, choice = pool.queue, pool.choice
        patience_s = self._ledger.config.patience_s
        entry = cast(Entry, queue.passed_over(now - patience_s) or queue.at(0))
        worker = choice.choose(entry.n_tokens, now, entry.avoid)
        if worker is not None:
            return entry, worker, False
        if later := choice.choose_for_later(entry.n_tokens, now, entry.avoid):
            worker, place = later
            late = cast("Entry | None", queue.at(place))
            if late is not None and worker.id not in late.avoid:
                return late, worker, False
        worker, due = choice.choose_for_trial(entry.n_tokens, now, entry.avoid)
        if worker is None:
            self._look_again(pool, min(due, now + _LOOK_S))
            return None
        last = cast(Entry, queue.last())  # the one that can best be late
        return entry if worker.id in last.avoid else last, worker, True

    def _look_again(self, pool: Pool, due: float) -> None:
        """Set a timer to look at the pool's queue then, even if nothing happens until then."""
        if due < pool.looks_at:
            pool.look = self._ledger.at(due, lambda now: self.dispatch(pool, now), pool.look)

    def _can_tell(self, mapping: str, pool: Pool) -> bool:
        """Whether the mapping is here, or at least at a worker: the store may be too small for all
        that are in use, and must not be fought for by requests whose worker has theirs.
        """
        return mapping in self._ledger.mappings or any(
            mapping in worker.mappings for worker in pool.workers.values()
        )

    def _must_wait(self, entry: Entry, worker: WorkerSession, pool: Pool, now: float) -> bool:
        """Whether a queued entry cannot run on that worker yet; it has left the queue then."""
        ledger = self._ledger
        mapping = entry.request.mapping_id
        known = not mapping or mapping in ledger.mappings or mapping in worker.mappings
        if not known:  # evicted while it waited
            self._want_mapping(entry, now)
        elif why := ledger.waiting_for_reply_room.why_wait(entry, now):
            ledger.places.move(entry, Place.REPLY_ROOM, why, now)
        else:
            return False
        return True

    def use_room(self, now: float) -> None:
        """Serve the requests that waited for room, before all new ones, where replies made room."""
        waiting = self._ledger.waiting_for_reply_room
        for entry in waiting.take_ready(now):
            self.take(entry, self._ledger.pools[entry.pool], now, again=True)
        due, look = waiting.next_look, self._look
        if due < (math.inf if look is None or look.call is None else look.when):
            # they are looked at after every event, so the timer has nothing to do
            self._look = self._ledger.at(due, lambda now: None, look)

    def _assign(
        self,
        entry: Entry,
        worker: WorkerSession,
        now: float,
        packet: Packet | None = None,
        *,
        is_trial: bool = False,
    ) -> None:
        """Give the entry to a worker; ``packet`` in place of the entry's own."""
        ledger = self._ledger
        packet = packet or entry.packet
        assert packet is not None
        mapping = entry.request.mapping_id
        if mapping and mapping not in worker.mappings:
            ledger.forward(
                Side.WORKER, worker.connection, cast(Packet, ledger.mappings.get(mapping))
            )
            worker.learn(mapping)
        worker.busy_until = expected_finish(worker, entry.n_tokens, now)
        ledger.measures.assigned(entry, worker, now)
        worker.running[entry.id] = now
        ledger.pools[worker.offer].choice.put(worker)
        ledger.reply_room.expect(entry)
        if not entry.workers:
            ledger.places.move(entry, Place.RUNNING, f"on worker {worker.id}", now)
        entry.workers.add(worker.id)
        ledger.counters["assignments"] += 1
        ledger.forward(Side.WORKER, worker.connection, packet)
        self.watch(entry, worker, now, unsure=is_trial)

    def watch(
        self, entry: Entry, worker: WorkerSession, now: float, *, unsure: bool = False
    ) -> None:
        """The worker has the entry from now on: notice when that takes far too long, by its own
        speed, or by its pool's if it is ``unsure``.
        """
        self.watch_all([entry], worker, now, unsure=unsure)

    def watch_all(
        self, entries: Iterable[Entry], worker: WorkerSession, now: float, *, unsure: bool
    ) -> None:
        """The same for several: what the worker has is counted once."""
        config = self._ledger.config
        late_s = (config.hedge_after or _LATE) * self._expected_s(worker, now, unsure=unsure)
        due = now + max(late_s, config.hedge_floor_s)
        for entry in entries:
            self._watch(entry.id, worker, due)  # a timer must not keep the payload of what ended

    def _watch(self, request_id: RequestId, worker: WorkerSession, due: float) -> None:
        self._set(worker, request_id, due, lambda now: self._overdue(request_id, worker, now))

    def _expected_s(self, worker: WorkerSession, now: float, *, unsure: bool) -> float:
        """What the worker should take for all that it has."""
        if worker.seconds_per_token is not None and not unsure:
            return worker.busy_until - now
        typical = self._ledger.pools[worker.offer].choice.typical_seconds_per_token()
        if typical is None:
            return _UNKNOWN_S
        has = (self._ledger.entries.get(request_id) for request_id in worker.running)
        return typical * sum(entry.n_tokens for entry in has if entry is not None)

    def _set(self, worker: WorkerSession, request_id: RequestId, due: float, call: _Call) -> None:
        """Set the timer that watches a worker's run of a request; it ends with the run."""
        old = worker.timers.get(request_id)
        worker.timers[request_id] = self._ledger.at(due, call, old)

    def end_run(self, worker: WorkerSession, request_id: RequestId) -> float | None:
        """The worker no longer has the request; since when it had it, or None if it had not."""
        worker.overdue.discard(request_id)
        self._ledger.timers.cancel(worker.timers.pop(request_id, None))
        return worker.running.pop(request_id, None)

    def _overdue(self, request_id: RequestId, worker: WorkerSession, now: float) -> None:
        """The worker has had the request for far too long: it gets nothing else until it has
        answered.
        """
        ledger = self._ledger
        worker.overdue.add(request_id)
        ledger.pools[worker.offer].choice.put(worker)
        if ledger.config.hedge_after:
            self._hedge(request_id, worker, now)

    def _hedge(self, request_id: RequestId, worker: WorkerSession, now: float) -> None:
        """Have another worker try as well."""
        ledger = self._ledger
        entry = ledger.entries.get(request_id)
        if entry is None or entry.workers != {worker.id} or entry.packet is None or entry.hedge:
            return
        pool = ledger.pools[worker.offer]
        avoid = {*entry.avoid, worker.id}
        other = pool.choice.free().choose(entry.n_tokens, now, avoid)
        if other is None or not self._may_hedge(entry, pool):
            due = now + ledger.config.hedge_floor_s
            self._set(worker, request_id, due, lambda now: self._hedge(request_id, worker, now))
            return
        ledger.counters["hedges"] += 1
        ledger.log("info", "hedged", request=str(entry.id), slow=worker.id, also=other.id)
        entry.hedge = other.id
        ledger.hedged.add(entry.id)
        self._assign(entry, other, now, _by_wire(entry.packet))

    def _may_hedge(self, entry: Entry, pool: Pool) -> bool:
        """Whether another may learn its mapping, and its pool does not run too much twice."""
        ledger = self._ledger
        mapping = entry.request.mapping_id
        can_be_told = not mapping or mapping in ledger.mappings
        running = sum(len(each.running) for each in pool.workers.values())
        hedged = sum(ledger.entries[request_id].pool == entry.pool for request_id in ledger.hedged)
        return can_be_told and hedged < max(1, ledger.config.hedge_share * running)


def _by_wire(packet: Packet) -> Packet:
    """The same request for an answer on the wire: only one of two runs may send directly."""
    request = cast(m.Request, packet.message)
    if request.direct is None:
        return packet
    return encode(replace(request, direct=None), packet.payload)
