"""Workers: who is there, who is back, who has gone with what."""

from __future__ import annotations

from typing import cast

from broker.core import fencing
from broker.core.dispatch import Dispatcher
from broker.core.events import Side
from broker.core.ledger import Ledger, heartbeat
from broker.core.pool import Pool
from broker.core.requests import Requests
from broker.core.state import Blame, WorkerSession
from broker.protocol import Packet
from broker.protocol import messages as m


class Workers:
    """Keeps the sessions of workers, and hears what workers say."""

    def __init__(self, ledger: Ledger, requests: Requests, dispatcher: Dispatcher) -> None:
        self._ledger = ledger
        self._requests = requests
        self._dispatcher = dispatcher

    def hello(self, connection: bytes, packet: Packet, now: float) -> None:
        """A worker is there, or there again: a new life, or a new connection of the same."""
        hello = cast(m.WorkerHello, packet.message)
        before = self._ledger.workers.get(hello.worker)
        if before is not None and fencing.is_older(hello, before, self._ledger.incarnation):
            refusal = fencing.fenced(before.id, hello.incarnation, before.incarnation)
            self._ledger.send(Side.WORKER, connection, refusal)
            return
        offer = hello.model.offer
        for other in self._ledger.pools_called(hello.model.model):
            if other.workers.keys() - {hello.worker} and other.description.offer != offer:
                self._refuse_model(connection, hello, other)
                return
        same = before is not None and before.incarnation == hello.incarnation
        had = self._had(before if same else None, hello)
        if before is not None:
            self._rejoin_or_replace(before, connection, hello, now)
        pool = self._ledger.pools.get(offer)
        if pool is None:
            pool = self._ledger.pools[offer] = Pool(hello.model)
        worker = WorkerSession(
            hello.worker,
            hello.incarnation,
            hello.model.model,
            offer,
            connection,
            hello.credits,
            now,
            self._ledger.admission(hello, before),
            fencing.replaced(hello, before),
        )
        worker.idle_since = now
        if before is not None and same:
            worker.seconds_per_token = before.seconds_per_token
            worker.last_seconds_per_token = before.last_seconds_per_token
        self._ledger.workers[worker.id] = pool.workers[worker.id] = worker
        self._ledger.worker_connections[connection] = worker
        self._ledger.welcome(Side.WORKER, worker)
        self._ledger.log(
            "info", "worker_joined", worker=worker.id, model=worker.model, credits=worker.credits
        )
        self._requests.clear_suspicion(worker, now)
        self._requests.adoption.adopt(worker, hello.held, had, now)
        pool.choice.put(worker)
        self._watch(worker)
        self._requests.route_waiting(now)
        self._dispatcher.dispatch(pool, now)

    def _had(self, before: WorkerSession | None, hello: m.WorkerHello) -> set[m.RequestId]:
        """What this life of a worker was given here and says that it still has.

        ``before`` is its session, which is about to end. What it only claimed there is not its own.
        """
        entries = self._ledger.entries
        held = [entries[request_id] for request_id in hello.held if request_id in entries]
        lost = {e.id for e in held if e.suspects.get(hello.worker) == hello.incarnation}
        if before is None:
            return lost
        return lost | {entry.id for entry in held if before.id in entry.workers}

    def _refuse_model(self, connection: bytes, hello: m.WorkerHello, pool: Pool) -> None:
        ours, theirs = pool.description.identity(), hello.model.identity()
        differing = [name for name in ours if ours[name] != theirs[name]]
        text = (
            f"the pool {hello.model.model!r} serves "
            + ", ".join(f"{name}={ours[name]!r}" for name in differing)
            + "; this worker has "
            + ", ".join(f"{name}={theirs[name]!r}" for name in differing)
            + "; give it another model name (--model-name), or the pool's weights and settings"
        )
        self._ledger.send(Side.WORKER, connection, m.Refused("other_model", text))
        self._ledger.log("warning", "worker_refused", worker=hello.worker, reason=text)

    def _rejoin_or_replace(
        self, before: WorkerSession, connection: bytes, hello: m.WorkerHello, now: float
    ) -> None:
        """The same worker again: on a new connection, or in a new life."""
        if hello.incarnation != before.incarnation:
            if before.connection != connection:
                refusal = fencing.fenced(before.id, before.incarnation, hello.incarnation)
                self._ledger.send(Side.WORKER, before.connection, refusal)
            self._lose(before, "a newer life of it said hello", now, Blame.GUILTY)
            return
        for request_id in hello.held:  # still its own: not lost, and adopted below
            entry = self._ledger.entries.get(request_id)
            if request_id in before.running and entry is not None:
                entry.workers.discard(before.id)
        reason = "it reconnected and no longer has the request"
        self._lose(before, reason, now, Blame.NONE)

    def disconnected(self, worker: WorkerSession, now: float) -> None:
        """Its connection is gone; when it comes back, it says what it still has."""
        self._lose(worker, "its connection closed", now, Blame.SUSPECT)

    def heartbeat(self, worker: WorkerSession, packet: Packet, now: float) -> None:
        """It is still there; so are we."""
        worker.direct = cast(m.Heartbeat, packet.message).direct
        beat = heartbeat(len(self._ledger.workers))
        self._ledger.forward(Side.WORKER, worker.connection, beat)

    def goodbye(self, worker: WorkerSession, packet: Packet, now: float) -> None:
        """It leaves on purpose."""
        self._lose(worker, cast(m.Goodbye, packet.message).reason, now, Blame.NONE)

    def draining(self, worker: WorkerSession, packet: Packet, now: float) -> None:
        """It finishes what it has, and takes no more; what it was given went before our answer."""
        worker.draining = True
        self._ledger.send(Side.WORKER, worker.connection, m.Draining())
        pool = self._ledger.pools[worker.offer]
        pool.choice.put(worker)
        self._ledger.log("info", "worker_draining", worker=worker.id, running=len(worker.running))
        self._dispatcher.dispatch(pool, now)  # a request may have waited for this one

    def reply(self, worker: WorkerSession, packet: Packet, now: float) -> None:
        """A reply or a failure came: the worker has a credit again, the client its answer."""
        message = cast(m.Reply | m.Failure, packet.message)
        since = self._dispatcher.end_run(worker, message.id)
        if since is None:
            self._ledger.counters["unasked_answers"] += 1
            self._ledger.log("warning", "unasked_answer", worker=worker.id, request=str(message.id))
            return
        worker.answered += 1
        pool = self._ledger.pools[worker.offer]
        self._reckon(worker, now)
        entry = self._ledger.entries.get(message.id)
        earlier = entry is not None and worker.id not in entry.workers  # cancelled and asked again
        whole = (
            isinstance(message, m.Reply)
            and not message.parts
            and entry is not None
            and self._requests.is_answer(message, entry)
        )
        if entry is None or entry.passing is not None or (earlier and not whole):
            self._ledger.counters["late_answers"] += 1
            self._requests.pass_on_transfer(packet)
        else:
            entry.workers.discard(worker.id)
            self._requests.conclude(entry, worker, packet, since, now)
        self._dispatcher.dispatch(pool, now)

    def part(self, worker: WorkerSession, packet: Packet, now: float) -> None:
        """The next part of a reply; of one that nobody wants any more, it ends here."""
        worker.moved_at = now
        entry = self._ledger.entries.get(cast(m.Part, packet.message).id)
        if entry is not None and entry.passing and entry.passing.worker == worker.id:
            self._requests.pass_on(entry, entry.passing, packet, now)

    def _reckon(self, worker: WorkerSession, now: float) -> None:
        """It goes on with the rest of what it has, and may be given more."""
        entries = map(self._ledger.entries.get, worker.running)
        n_tokens = sum(entry.n_tokens for entry in entries if entry is not None)
        worker.busy_until = now + (worker.seconds_per_token or 0.0) * n_tokens
        worker.idle_since = now
        self._ledger.pools[worker.offer].choice.put(worker)

    def _watch(self, worker: WorkerSession) -> None:
        def check(now: float) -> None:
            if now < worker.last_seen + self._ledger.config.liveness_s:
                self._watch(worker)
            else:
                reason = f"silent for {now - worker.last_seen:.1f} s"
                self._lose(worker, reason, now, Blame.SUSPECT)

        worker.watch = self._ledger.at(worker.last_seen + self._ledger.config.liveness_s, check)

    def _lose(self, worker: WorkerSession, reason: str, now: float, blame: Blame) -> None:
        """Forget a worker; what it was working on goes back to the head of the queue.

        ``blame`` says whether its requests may have taken it down.
        """
        del self._ledger.workers[worker.id]
        del self._ledger.worker_connections[worker.connection]
        for timer in (worker.watch, *worker.timers.values()):
            self._ledger.timers.cancel(timer)
        pool = self._ledger.pools[worker.offer]
        del pool.workers[worker.id]
        pool.choice.discard(worker)
        self._ledger.log(
            "info", "worker_left", worker=worker.id, reason=reason, running=len(worker.running)
        )
        for request_id in list(worker.passing):
            self._requests.break_off(self._ledger.entries[request_id], reason, now)
        for request_id, since in worker.running.items():
            entry = self._ledger.entries.get(request_id)
            if entry is None or worker.id not in entry.workers:
                continue
            entry.workers.discard(worker.id)
            entry.tell(f"worker {worker.id} had it for {now - since:.1f} s: {reason}")
            if blame is Blame.SUSPECT:
                entry.suspects[worker.id] = worker.incarnation
                self._ledger.orphaned[entry.id] = entry
            self._requests.retry(
                entry, "" if blame is Blame.NONE else worker.id, "lost_workers", now
            )
        self._dispatcher.dispatch(pool, now)  # a request may have waited for this worker
        self._close_pool(pool, now)

    def _close_pool(self, pool: Pool, now: float) -> None:
        """A pool that has lost its last worker stays while requests wait for another."""
        offer = pool.description.offer
        if pool.workers:
            return
        if any(entry.pool == offer for entry in self._ledger.entries.values()):
            due = now + self._ledger.config.liveness_s
            again = self._ledger.at(due, lambda now: self._close_pool(pool, now), pool.closing)
            pool.closing = again
        else:
            self._ledger.timers.cancel(pool.look)
            self._ledger.timers.cancel(pool.closing)
            del self._ledger.pools[offer]
            if not self._ledger.pools_called(pool.description.model):
                self._ledger.measures.left(pool.description.model)
