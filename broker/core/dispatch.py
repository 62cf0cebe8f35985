"""From a pool's queue to a worker: who gets what, and what must wait for something else first."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

from broker.core.events import Side
from broker.core.ledger import Ledger
from broker.core.pool import Pool
from broker.core.schedule import expected_finish
from broker.core.state import Entry, WorkerSession
from broker.protocol import Packet, encode
from broker.protocol import messages as m


class Dispatcher:
    """Keeps the requests of each pool where they have to wait, and gives them to workers.

    A request waits for its mapping, in its pool's queue, or for room for its reply.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        #: when a timer will have the requests looked at that wait for room
        self._looks_at = math.inf

    def take(self, entry: Entry, pool: Pool, now: float, *, again: bool = False) -> None:
        """Have this pool serve the request; ``again`` puts it before all new ones."""
        entry.pool = pool.description.offer
        mapping = entry.request.mapping_id
        if mapping and mapping not in self._ledger.mappings:
            self._ledger.mappingless.setdefault(mapping, {})[entry.id] = entry
            if (client := self._ledger.clients.get(entry.client)) is not None:
                self._ledger.answer(client, m.MappingWanted(mapping))
            return
        pool.queue.push(entry, again=again)
        self.dispatch(pool, now)

    def dispatch(self, pool: Pool, now: float) -> None:
        """Give queued requests to workers with free credits."""
        queue, choice = pool.queue, pool.choice
        while len(queue) and len(choice.free()):
            entry = cast(Entry, queue.at(0))
            worker = choice.choose(entry.n_tokens, now, entry.avoid)
            if worker is None and (later := choice.choose_for_later(entry.n_tokens, now)):
                worker, place = later
                entry = cast(Entry, queue.at(place))
            if worker is None or entry is None:
                return
            if not self._must_wait(entry, pool, now):
                queue.take(entry)
                self._assign(entry, worker, now)

    def _must_wait(self, entry: Entry, pool: Pool, now: float) -> bool:
        """Whether a queued entry cannot run yet; then it has left the queue."""
        ledger = self._ledger
        mapping = entry.request.mapping_id
        if mapping and mapping not in ledger.mappings:  # evicted while it waited
            pool.queue.remove(entry)
            self.take(entry, pool, now, again=True)
        elif ledger.waiting_for_reply_room.must_wait(entry, now):
            pool.queue.remove(entry)
        else:
            return False
        return True

    def unqueue(self, entry: Entry) -> None:
        """Take a request from wherever it waits."""
        ledger = self._ledger
        ledger.poolless.pop(entry.id, None)
        ledger.suspected.pop(entry.id, None)
        ledger.waiting_for_reply_room.discard(entry)
        ledger.waiting_for_request_room.discard(entry)
        if ledger.recalled.pop(entry.id, None):
            ledger.request_room.free(entry.id)
        mapping = entry.request.mapping_id
        if waiting := ledger.mappingless.get(mapping):
            waiting.pop(entry.id, None)
            if not waiting:
                del ledger.mappingless[mapping]
        if entry.pool:
            ledger.pools[entry.pool].queue.remove(entry)

    def use_room(self, now: float) -> None:
        """Where replies have made room, serve who waited for it before all new ones."""
        waiting = self._ledger.waiting_for_reply_room
        for entry in waiting.take_ready(now):
            self.take(entry, self._ledger.pools[entry.pool], now, again=True)
        if waiting.next_look < self._looks_at:
            self._looks_at = waiting.next_look
            self._ledger.at(self._looks_at, self._look)

    def _look(self, now: float) -> None:
        self._looks_at = math.inf  # the requests are looked at after every event

    def _assign(
        self, entry: Entry, worker: WorkerSession, now: float, packet: Packet | None = None
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
            worker.mappings.add(mapping)
        worker.busy_until = expected_finish(worker, entry.n_tokens, now)
        ledger.measures.assigned(entry, worker, now)
        worker.running[entry.id] = now
        ledger.pools[worker.offer].choice.put(worker)
        ledger.reply_room.expect(entry)
        entry.workers.add(worker.id)
        ledger.counters["assignments"] += 1
        ledger.forward(Side.WORKER, worker.connection, packet)
        if not entry.hedge:
            self.watch(entry, worker, now)

    def watch(self, entry: Entry, worker: WorkerSession, now: float) -> None:
        """Have another worker try as well when this one has had the entry for far too long."""
        ledger = self._ledger
        if worker.seconds_per_token is not None and ledger.config.hedge_after:
            late_s = ledger.config.hedge_after * (worker.busy_until - now)
            due = now + max(late_s, ledger.config.hedge_floor_s)
            ledger.at(due, lambda now: self._hedge(entry, worker, now))

    def _hedge(self, entry: Entry, worker: WorkerSession, now: float) -> None:
        """The worker has had the entry for far too long: have another one try as well."""
        ledger = self._ledger
        alone = ledger.entries.get(entry.id) is entry and entry.workers == {worker.id}
        if not alone or worker.running.get(entry.id) is None or entry.packet is None:
            return
        pool = ledger.pools[worker.offer]
        other = pool.choice.choose(entry.n_tokens, now, {*entry.avoid, worker.id})
        running = sum(len(each.running) for each in pool.workers.values())
        if other in (None, worker) or not self._may_hedge(entry, running):
            ledger.at(
                now + ledger.config.hedge_floor_s, lambda now: self._hedge(entry, worker, now)
            )
            return
        ledger.counters["hedges"] += 1
        ledger.log("info", "hedged", request=str(entry.id), slow=worker.id, also=other.id)
        entry.hedge = other.id
        ledger.hedged.add(entry.id)
        self._assign(entry, other, now, _by_wire(entry.packet))

    def _may_hedge(self, entry: Entry, running: int) -> bool:
        ledger = self._ledger
        mapping = entry.request.mapping_id
        can_be_told = not mapping or mapping in ledger.mappings
        return can_be_told and len(ledger.hedged) < max(1, ledger.config.hedge_share * running)


def _by_wire(packet: Packet) -> Packet:
    """The same request for an answer on the wire: only one of two runs may send directly."""
    request = cast(m.Request, packet.message)
    if request.direct is None:
        return packet
    return encode(replace(request, direct=None), packet.payload)
