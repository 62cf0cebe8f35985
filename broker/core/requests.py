"""The life of a request, from its acceptance to its end."""

from __future__ import annotations

from typing import cast

from broker.core.adoption import Adoption
from broker.core.dispatch import Dispatcher
from broker.core.events import Side
from broker.core.held import HeldAnswers, answers
from broker.core.ledger import Ledger
from broker.core.places import Place, spent
from broker.core.pool import Pool
from broker.core.schedule import learn_speed
from broker.core.state import ClientSession, Entry, Passing, WorkerSession
from broker.protocol import Packet, encode
from broker.protocol import messages as m


class Requests:
    """Every request ends exactly once: in an answer, or because its client has gone or cancels."""

    def __init__(self, ledger: Ledger, dispatcher: Dispatcher) -> None:
        self._ledger = ledger
        self._dispatcher = dispatcher
        #: whether a timer for those without a pool is set
        self._watches_pools = False
        self._held = HeldAnswers(ledger)
        self.adoption = Adoption(ledger, dispatcher, self._pool_of, self.drop)

    def accept(self, client: ClientSession, packet: Packet, now: float) -> None:
        """Take a request from its client, which may have sent it before."""
        ledger = self._ledger
        request = cast(m.Request, packet.message)
        if (request.id.client, request.id.incarnation) != (client.id, client.incarnation):
            ledger.log("warning", "foreign_request", client=client.id, request=str(request.id))
        elif (held := self._held.find(packet)) is not None:
            ledger.counters["answered_again"] += 1
            self._held.sent(request.id, held.nbytes, now)
            ledger.forward(Side.CLIENT, client.connection, held)
        elif request.id not in client.requests and len(client.requests) >= ledger.config.window:
            there, window = len(client.requests), ledger.config.window
            text = f"{there} requests are under way, the window is {window}"
            ledger.answer(client, m.Failure(request.id, "over_window", text))
        elif (entry := ledger.entries.get(request.id)) is not None:
            self._asked_again(entry, packet, client, now)
        else:
            entry = Entry(request, None, client.job, now, now + request.ttl_s)
            ledger.entries[request.id] = entry
            ledger.reply_room.free(entry.id)  # of a reply that never came, or it would not ask
            client.requests.add(request.id)
            ledger.counters["requests"] += 1
            if self._keep(entry, packet, now):
                self.route(entry, now)

    def is_answer(self, reply: m.Reply, entry: Entry) -> bool:
        """Whether a reply belongs to this request, though its worker does not run it now."""
        return entry.packet is not None and answers(reply, entry.packet)

    def _asked_again(self, entry: Entry, packet: Packet, client: ClientSession, now: float) -> None:
        request = cast(m.Request, packet.message)
        self._ledger.counters["resends"] += 1
        entry.expires_at = now + request.ttl_s
        if entry.passing is not None and now >= entry.passing.awaited_until:
            self.break_off(entry, "its client did not get all of it", now)
        if entry.packet is None and entry.under_way:  # one has it from before a restart
            entry.ask(request)
            entry.job = client.job
            client.requests.add(entry.id)
            self.adoption.check(entry, now)
        if entry.packet is None and self._keep(entry, packet, now) and not entry.under_way:
            self.route(entry, now)
        if entry.id in self._ledger.waiting_for_mapping.get(request.mapping_id, {}):
            self._ledger.answer(client, m.MappingWanted(request.mapping_id))

    def _keep(self, entry: Entry, packet: Packet, now: float) -> bool:
        """Whether there is room for the request's payload; if not, it is asked for again later.

        A payload that a worker has already is kept in any case, for another worker may need it.
        """
        ledger = self._ledger
        entry.nbytes = packet.nbytes
        has_room = entry.place is Place.RECALLED or entry.under_way
        if not has_room and (why := ledger.waiting_for_request_room.why_wait(entry, now)):
            if entry.place is not Place.REQUEST_ROOM:
                ledger.places.move(entry, Place.REQUEST_ROOM, why, now)
            return False
        ledger.request_room.put(entry.id, entry.nbytes)
        entry.packet = packet
        return True

    def recall(self, now: float) -> None:
        """Ask clients again for payloads that were let go, where requests have made room."""
        ledger = self._ledger
        for entry in ledger.waiting_for_request_room.take_ready(now):
            if ledger.waiting_for_request_room.why_wait(entry, now):
                ledger.waiting_for_request_room.discard(entry)
                ledger.waiting_for_request_room.add(entry, now)
                continue  # the client has room for it, and all together have not
            ledger.request_room.put(entry.id, entry.nbytes)
            ledger.places.move(entry, Place.RECALLED, "its client has not sent it yet", now)
            ledger.counters["recalls"] += 1
            ledger.answer(ledger.clients[entry.client], m.RequestWanted(entry.id))

    def ask_again(self, client: ClientSession) -> None:
        """Ask a client that is back for its payloads again: it may not have heard before."""
        for entry in self._ledger.recalled.values():
            if entry.client == client.id:
                self._ledger.answer(client, m.RequestWanted(entry.id))

    def route(self, entry: Entry, now: float, *, again: bool = False) -> None:
        """Find the pool that serves an entry; an entry without a pool waits for one."""
        pool = self._pool_of(entry)
        if pool is not None:
            self._dispatcher.take(entry, pool, now, again=again)
            return
        wanted = entry.request.offer or entry.request.model
        why = f"no worker serves {wanted}" if wanted else "it names no model, and several are here"
        self._ledger.places.move(entry, Place.POOL, why, now)
        if entry.request.offer:
            return  # its client says how long it waits for its own
        self._watch_pools(now + self._ledger.config.model_grace_s)

    def route_waiting(self, now: float) -> None:
        """Route the entries that wait for a pool, which a new worker may have made."""
        for entry in list(self._ledger.waiting_for_pool.values()):
            if self._pool_of(entry) is not None:
                self.route(entry, now)

    def _pool_of(self, entry: Entry) -> Pool | None:
        """The pool of the offer that the entry names, else of its model, else the only pool."""
        ledger = self._ledger
        if offer := entry.pool or entry.request.offer:
            return ledger.pools.get(offer)
        model = entry.request.model
        named = ledger.pools_called(model) if model else list(ledger.pools.values())
        served = [pool for pool in named if pool.workers]
        found = served or named
        return found[0] if len(found) == 1 else None

    def _watch_pools(self, when: float) -> None:
        """Set one timer for all entries without a pool; a cancelled one leaves none behind."""
        if not self._watches_pools:
            self._watches_pools = True
            self._ledger.at(when, self._still_without_pool)

    def _still_without_pool(self, now: float) -> None:
        """End the requests whose model no worker has served for long, though there are workers."""
        self._watches_pools = False
        grace_s = self._ledger.config.model_grace_s
        if self._ledger.pools:
            for entry in [e for e in self._unnamed() if e.place_since + grace_s <= now]:
                self._fail_unknown_model(entry, now)
        if unnamed := self._unnamed():
            first = min(entry.place_since for entry in unnamed)
            self._watch_pools(first + grace_s if first + grace_s > now else now + grace_s)

    def _unnamed(self) -> list[Entry]:
        """The requests without a pool that name no offer. Those that name one wait for it."""
        return [
            entry for entry in self._ledger.waiting_for_pool.values() if not entry.request.offer
        ]

    def _fail_unknown_model(self, entry: Entry, now: float) -> None:
        wanted = entry.request.model
        there = ", ".join(sorted({p.description.model for p in self._ledger.pools.values()}))
        text = (
            f"no worker serves the model {wanted!r}; the models here are: {there}"
            if wanted
            else f"the request names no model and the broker has several: {there}; name one"
        )
        self.finish(entry, encode(m.Failure(entry.id, "unknown_model", text)), now)

    def expire(self, client: ClientSession, now: float) -> None:
        """Answer a client's requests that are past their deadline; the client keeps it exactly."""
        for entry in [self._ledger.entries[request_id] for request_id in client.requests]:
            if now >= entry.expires_at:
                self._ledger.counters["expired"] += 1
                waited = f"nobody answered within {now - entry.accepted_at:.1f} s"
                story = "; ".join([waited, *entry.story, spent(entry, now)])
                self.finish(entry, encode(m.Failure(entry.id, "expired", story)), now)

    def conclude(
        self, entry: Entry, worker: WorkerSession, packet: Packet, since: float, now: float
    ) -> None:
        """A worker has answered a request that it had ``since`` then: is that its end?"""
        ledger = self._ledger
        message = packet.message
        if isinstance(message, m.Reply):
            if not entry.adopted:  # nobody here knows since when it had that
                computed_s = min(message.compute_s, now - since)
                choice = ledger.pools[worker.offer].choice
                is_first = worker.seconds_per_token is None
                typical = choice.typical_seconds_per_token() if is_first else None
                learn_speed(worker, entry.n_tokens, computed_s, typical)
            ledger.pools[worker.offer].choice.put(worker)
            ledger.counters["hedges_won"] += entry.hedge == worker.id
            if message.parts:
                self._begin_passing(entry, Passing(worker.id, packet, since), now)
            else:
                self._replied(entry, worker, message, packet.nbytes, since, now)
                self.finish(entry, packet, now)
            return
        failure = cast(m.Failure, message)
        if failure.code == "unknown_mapping":  # its store is bounded too: tell it again
            worker.mappings.pop(entry.request.mapping_id, None)
            self._given_back(entry, worker, failure, now)
        elif failure.code == "cancelled":  # before its client came back and asked again
            self._given_back(entry, worker, failure, now)
        elif failure.code == "target_failed":
            entry.tell(f"worker {worker.id} after {now - since:.1f} s: {failure.text}")
            entry.failed_on.append(worker.id)
            if self._all_failed(entry, worker):
                self._give_up(entry, failure.code, now)
            else:
                self._queue_again(entry, now)
        else:
            self.finish(entry, packet, now)

    def _replied(
        self,
        entry: Entry,
        worker: WorkerSession,
        reply: m.Reply,
        nbytes: int,
        since: float,
        now: float,
    ) -> None:
        ledger = self._ledger
        computed_s = min(reply.compute_s, now - since)
        ledger.measures.replied(entry, worker, since, computed_s, now)
        ledger.counters["replies"] += 1
        ledger.counters["direct_replies"] += reply.transfer is not None
        ledger.counters["reply_bytes"] += nbytes
        if entry.client in ledger.clients:  # what is learned of one is forgotten with it
            ledger.reply_room.learn(entry, nbytes)

    def _begin_passing(self, entry: Entry, passing: Passing, now: float) -> None:
        """Begin to pass a reply on in parts; no other worker needs to compute it.

        The reply is lost where its client is away, and the client will ask again. It is lost too
        where the client has not asked this broker yet: there is no request to compare it with.
        """
        ledger = self._ledger
        client = ledger.clients.get(entry.client)
        if client is None or entry.packet is None or not self._takes(client, entry):
            self.drop(entry, now, cancel=True)
            return
        client.requests.add(entry.id)
        self._withdraw(entry)
        ledger.hedged.discard(entry.id)
        entry.hedge, entry.passing = "", passing
        ledger.places.move(entry, Place.PASSING, f"from worker {passing.worker}", now)
        ledger.workers[passing.worker].passing.add(entry.id)
        ledger.reply_room.put(entry.id, passing.reply.tensor_bytes)
        self._watch_parts(entry, passing, now)
        ledger.forward(Side.CLIENT, client.connection, passing.packet)

    def _takes(self, client: ClientSession, entry: Entry) -> bool:
        """Whether the client is here; after a restart of ours it may not have asked again."""
        if client.connection is None or client.incarnation != entry.id.incarnation:
            return False
        has_room = len(client.requests) < self._ledger.config.window
        return entry.id in client.requests or has_room

    def pass_on(self, entry: Entry, passing: Passing, packet: Packet, now: float) -> None:
        """Pass the next part of a reply on to its client. The last part frees the worker, and the
        request ends when its client says that it has all parts.
        """
        if wrong := passing.take(packet):
            self._ledger.counters["bad_messages"] += 1
            self.break_off(entry, wrong, now, blamed=True)
            return
        client = self._ledger.clients[entry.client]
        self._ledger.forward(Side.CLIENT, client.connection, packet)
        if passing.complete:
            self._ledger.timers.cancel(passing.watch)
            worker = self._ledger.workers[passing.worker]
            nbytes = passing.packet.nbytes + passing.nbytes
            self._replied(entry, worker, passing.reply, nbytes, passing.since, now)
            client.answered += 1
            worker.passing.discard(entry.id)
            passing.awaited_until = now + self._ledger.config.liveness_s
            self._held.sent(entry.id, passing.reply.tensor_bytes, now)

    def _watch_parts(self, entry: Entry, passing: Passing, now: float) -> None:
        """Break a reply off when its worker has sent nothing of any reply for too long."""
        worker = self._ledger.workers[passing.worker]
        worker.moved_at = now

        def check(now: float) -> None:
            due = worker.moved_at + self._ledger.config.part_s
            if now >= due:
                why = f"no part of it came for {now - worker.moved_at:.1f} s"
                self.break_off(entry, why, now, blamed=True)
            else:
                passing.watch = self._ledger.at(due, check)

        passing.watch = self._ledger.at(now + self._ledger.config.part_s, check)

    def _given_back(
        self, entry: Entry, worker: WorkerSession, failure: m.Failure, now: float
    ) -> None:
        """Try other workers for a request that one gave back untried, but not for ever."""
        entry.given_back_by.append(worker.id)
        entry.tell(f"worker {worker.id} gave it back: {failure.code} {failure.text}")
        if len(entry.given_back_by) < 2 * self._ledger.config.max_losses or entry.workers:
            self._queue_again(entry, now)
        else:
            self._give_up(entry, failure.code, now)

    def break_off(self, entry: Entry, why: str, now: float, *, blamed: bool = False) -> None:
        """Run a request again whose reply broke off. Where the worker is ``blamed`` for what it
        sent, this counts as a failed attempt.
        """
        assert entry.passing is not None
        worker_id = entry.passing.worker
        entry.tell(f"the reply of worker {entry.passing.worker} broke off: {why}")
        self._end_passing(entry)
        if blamed:
            self.retry(entry, worker_id, "lost_workers", now)
        else:
            self._queue_again(entry, now)

    def end_passing(self, client: ClientSession, now: float) -> None:
        """Forget the replies whose parts a lost connection had: their client will ask again."""
        for entry in [self._ledger.entries[request_id] for request_id in client.requests]:
            if entry.passing is not None:
                self.drop(entry, now, cancel=False)

    def _end_passing(self, entry: Entry) -> None:
        if entry.passing is not None:
            self._ledger.timers.cancel(entry.passing.watch)
            if (worker := self._ledger.workers.get(entry.passing.worker)) is not None:
                worker.passing.discard(entry.id)
            entry.passing = None

    def pass_on_transfer(self, packet: Packet) -> None:
        """Tell a client also of a transfer that it no longer wants: the client must receive it, to
        stay in step with the worker.
        """
        message = packet.message
        if isinstance(message, m.Reply) and m.comes_directly(message):
            client = self._ledger.clients.get(message.id.client)
            if client is not None and client.incarnation == message.id.incarnation:
                self._ledger.forward(Side.CLIENT, client.connection, packet)

    def retry(self, entry: Entry, failed_on: str, code: str, now: float) -> None:
        """Queue an entry again after an attempt that failed, unless it has failed too often.

        ``failed_on`` is the worker, or nothing when the attempt is not the request's fault.
        """
        if failed_on:
            entry.failed_on.append(failed_on)
        if entry.workers or entry.packet is None or not self._failed_too_often(entry):
            self._queue_again(entry, now)
        elif entry.suspects:
            why = f"workers {', '.join(sorted(entry.suspects))} may come back"
            self._ledger.places.move(entry, Place.SUSPECTED, why, now)
            due = now + self._ledger.config.liveness_s
            entry.timer = self._ledger.at(due, lambda now: self._give_up(entry, code, now))
        else:
            self._give_up(entry, code, now)

    def _all_failed(self, entry: Entry, worker: WorkerSession) -> bool:
        """Whether the target raised on so many workers, or on all, that it will raise again."""
        if entry.workers:
            return False
        there = self._ledger.pools[worker.offer].workers.keys()
        return self._failed_too_often(entry) or there <= set(entry.failed_on)

    def _failed_too_often(self, entry: Entry) -> bool:
        return len(entry.failed_on) >= self._ledger.config.max_losses

    def clear_suspicion(self, worker: WorkerSession, now: float) -> None:
        """Clear the requests that were suspected of having taken down a worker that is back."""
        for entry in list(self._ledger.orphaned.values()):
            if entry.suspects.pop(worker.id, None) != worker.incarnation:
                continue
            entry.failed_on.remove(worker.id)
            if entry.id in self._ledger.suspected and not self._failed_too_often(entry):
                self._queue_again(entry, now)

    def _give_up(self, entry: Entry, code: str, now: float) -> None:
        attempts = len(entry.failed_on) + len(entry.given_back_by)
        story = f"given up after {attempts} attempt{'s' if attempts != 1 else ''}: " + "; ".join(
            [*entry.story, spent(entry, now)]
        )
        self.finish(entry, encode(m.Failure(entry.id, code, story)), now)

    def _queue_again(self, entry: Entry, now: float) -> None:
        """Put an entry before all new ones, unless it still runs elsewhere."""
        if entry.workers:
            return
        entry.hedge = ""
        self._ledger.hedged.discard(entry.id)
        self._ledger.reply_room.free(entry.id)
        if entry.packet is None:  # from before a restart: its client has it, if it is there
            self.drop(entry, now, cancel=False)
            if (client := self._ledger.clients.get(entry.client)) is not None:
                self._ledger.answer(client, m.RequestWanted(entry.id))
        else:
            self._ledger.counters["requeues"] += 1
            self.route(entry, now, again=True)

    def finish(self, entry: Entry, answer: Packet, now: float) -> None:
        """Deliver the answer, keep it until it is acknowledged, forget the request."""
        if isinstance(failure := answer.message, m.Failure):
            self._ledger.counters["failures"] += 1
            told = {"request": str(entry.id), "code": failure.code, "text": failure.text}
            self._ledger.log("warning", "request_failed", **told)
        client = self._ledger.clients.get(entry.client)
        self.drop(entry, now, cancel=True)
        if client is not None and client.incarnation != entry.id.incarnation:
            return
        asked = entry.packet is not None or isinstance(answer.message, m.Reply)
        if asked and not m.comes_directly(answer.message):  # a transfer is not made twice
            self._held.keep(entry.id, answer, now)
        if entry.packet is None and not m.comes_directly(answer.message):
            return  # it is compared with the request once that is asked here
        if client is not None:
            client.answered += 1
            if client.connection is not None and isinstance(answer.message, m.Reply):
                self._held.sent(entry.id, answer.nbytes, now)
            self._ledger.forward(Side.CLIENT, client.connection, answer)

    def drop(self, entry: Entry, now: float, *, cancel: bool) -> None:
        """Forget a request wherever it is; workers that run it are told if ``cancel``."""
        del self._ledger.entries[entry.id]
        self._ledger.orphaned.pop(entry.id, None)
        self._ledger.request_room.free(entry.id)
        self._ledger.hedged.discard(entry.id)
        self._ledger.reply_room.free(entry.id)
        self._ledger.places.move(entry, Place.ENDED, "", now)
        self._end_passing(entry)
        if (client := self._ledger.clients.get(entry.client)) is not None:
            client.requests.discard(entry.id)
        if cancel:
            self._withdraw(entry)

    def _withdraw(self, entry: Entry) -> None:
        """Tell the workers that run the entry to stop."""
        for worker_id in sorted(entry.workers):
            worker = self._ledger.workers[worker_id]
            self._ledger.send(Side.WORKER, worker.connection, m.Cancel(entry.id))
        entry.workers.clear()
