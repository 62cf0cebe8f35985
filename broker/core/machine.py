"""The broker as a state machine: ``handle(event, now) -> actions``.

Nothing here blocks, sleeps, reads a clock or draws a random number, so a schedule of events
replays. The broker holds no state that its peers could not tell it again: after a restart clients
resend, workers say what they hold, and mappings are asked for by their hash.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

from broker.core.config import BrokerConfig
from broker.core.events import Action, BadBytes, ConnectionLost, Event, Log, Received, Send, Side
from broker.core.measures import Measures
from broker.core.pool import Pool
from broker.core.room import Room
from broker.core.schedule import expected_finish, learn_speed
from broker.core.state import Blame, ClientSession, Entry, PacketStore, WorkerSession
from broker.protocol import Packet, encode, mapping_id
from broker.protocol import messages as m
from broker.protocol.names import own_name, owns


class BrokerCore:
    """Who is there, who waits, who works on what.

    ``incarnation`` names this life of the broker and must differ from any other's.
    """

    def __init__(self, incarnation: str, config: BrokerConfig | None = None) -> None:
        self.incarnation = incarnation
        self.config = config or BrokerConfig()
        self.clients: dict[str, ClientSession] = {}
        self.workers: dict[str, WorkerSession] = {}
        self.client_connections: dict[bytes, ClientSession] = {}
        self.worker_connections: dict[bytes, WorkerSession] = {}
        self.pools: dict[str, Pool] = {}
        #: every accepted request that is not answered yet
        self.entries: dict[m.RequestId, Entry] = {}
        #: requests that no pool can take yet, in order of arrival
        self.poolless: dict[m.RequestId, Entry] = {}
        #: requests that have lost a worker which may come back
        self.bereft: dict[m.RequestId, Entry] = {}
        #: requests that may have taken down too many workers -> when these had time to return
        self.suspected: dict[m.RequestId, float] = {}
        #: mapping -> requests that wait for its content
        self.mappingless: dict[str, dict[m.RequestId, Entry]] = {}
        self.mappings: PacketStore[str] = PacketStore(self.config.held_mapping_bytes)
        self.answers: PacketStore[m.RequestId] = PacketStore(self.config.held_answer_bytes)
        #: whether a timer for these two is set
        self._watches_answers = self._watches_poolless = False
        #: requests that run a second time
        self.hedged: set[m.RequestId] = set()
        self.counters: dict[str, int] = dict.fromkeys(_COUNTERS, 0)
        self.measures = Measures()
        self.room = Room(self.config.max_client_bytes, self.config.max_total_bytes)
        #: client -> its requests that wait because it has enough replies, in order
        self.parked: dict[str, dict[m.RequestId, Entry]] = {}
        #: requests that wait because all clients together have, in order
        self.crowded: dict[m.RequestId, Entry] = {}
        self._timers: list[tuple[float, int, Callable[[float], None]]] = []
        self._timer_numbers = itertools.count()
        self._actions: list[Action] = []

    # -- the only way in ------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; say what is to be sent and logged. ``now`` is monotonic seconds."""
        self._actions = []
        if isinstance(event, Received):
            self._received(event, now)
        elif isinstance(event, ConnectionLost):
            self._connection_lost(event.side, event.connection, now)
        elif isinstance(event, BadBytes):
            self.counters["bad_messages"] += 1
            self._log("warning", "bad_message", side=event.side.value, error=event.error)
            self._answer_bad_bytes(event)
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2](now)
        for client_id in self.room.take_freed():
            self._unpark(client_id, now)
        return self._actions

    @property
    def next_timer(self) -> float | None:
        """When :class:`Tick` should come at the latest."""
        return self._timers[0][0] if self._timers else None

    def goodbye(self) -> list[Action]:
        """Tell all peers that this broker stops."""
        self._actions = []
        for connection in self.client_connections:
            self._send(Side.CLIENT, connection, m.Goodbye("the broker stops"))
        for connection in self.worker_connections:
            self._send(Side.WORKER, connection, m.Goodbye("the broker stops"))
        return self._actions

    def _received(self, event: Received, now: float) -> None:
        message = event.packet.message
        handlers = _FROM_CLIENT if event.side is Side.CLIENT else _FROM_WORKER
        handler = handlers.get(type(message))
        if handler is None:
            self.counters["bad_messages"] += 1
            self._log(
                "warning", "wrong_message", side=event.side.value, kind=type(message).__name__
            )
            return
        if isinstance(message, (m.ClientHello, m.WorkerHello)):
            name = message.client if isinstance(message, m.ClientHello) else message.worker
            if owns(name, event.user):
                handler(self, event.connection, event.packet, now)
            else:
                self._refuse_name(event, name)
            return
        session = self._connections(event.side).get(event.connection)
        if session is None:
            self._send(event.side, event.connection, m.HelloWanted(self.incarnation))
            return
        session.last_seen = now
        handler(self, session, event.packet, now)

    def _answer_bad_bytes(self, event: BadBytes) -> None:
        """What was lost may have been anything: a known peer's hello tells again what matters."""
        if event.other_version:
            self._send(event.side, event.connection, m.Refused("version", event.error))
        elif event.connection in self._connections(event.side):
            self._send(event.side, event.connection, m.HelloWanted(self.incarnation))

    def _connections(self, side: Side) -> dict[bytes, Any]:
        return self.client_connections if side is Side.CLIENT else self.worker_connections

    def _refuse_name(self, event: Received, name: str) -> None:
        text = (
            f"the name {name!r} is not this key's to use; its names end in "
            f"{own_name('', event.user)!r}"
        )
        self._send(event.side, event.connection, m.Refused("foreign_name", text))
        self._log("warning", "foreign_name", side=event.side.value, name=name, key=event.user)

    def _connection_lost(self, side: Side, connection: bytes, now: float) -> None:
        if side is Side.WORKER:
            worker = self.worker_connections.get(connection)
            if worker is not None:
                self._lose_worker(worker, "its connection closed", now, Blame.SUSPECT)
            return
        client = self.client_connections.pop(connection, None)
        if client is not None:
            client.connection = None
            client.last_seen = now
            self.room.free_sent(client.id, client.requests)
            self._log(
                "info", "client_disconnected", client=client.id, requests=len(client.requests)
            )

    # -- clients --------------------------------------------------------------------------------

    def _client_hello(self, connection: bytes, packet: Packet, now: float) -> None:
        hello = cast(m.ClientHello, packet.message)
        client = self.clients.get(hello.client)
        if client is not None and hello.incarnation < client.incarnation:
            self._send(Side.CLIENT, connection, _fenced(hello.client, hello, client))
            return
        if client is not None and hello.incarnation > client.incarnation:
            self._forget_client(client, "a newer life of it said hello", now)
            if client.connection is not None:
                self._send(Side.CLIENT, client.connection, _fenced(client.id, client, hello))
            client = None
        if client is None:
            client = ClientSession(
                hello.client, hello.incarnation, hello.job, hello.rank, connection, now
            )
            self.clients[client.id] = client
            self._log("info", "client_joined", client=client.id, job=client.job, rank=client.rank)
            self._watch_client(client)
        elif client.connection is not None:
            del self.client_connections[client.connection]
        client.connection = connection
        client.last_seen = now
        self.client_connections[connection] = client
        self.room.free_sent(client.id, client.requests)
        self._send(Side.CLIENT, connection, self._welcome(self.config.window))

    def _client_heartbeat(self, client: ClientSession, packet: Packet, now: float) -> None:
        client.direct = cast(m.Heartbeat, packet.message).direct
        waits = any(request_id in self.poolless for request_id in client.requests)
        self._answer(client, m.Heartbeat(0 if waits else len(self.workers)))

    def _client_goodbye(self, client: ClientSession, packet: Packet, now: float) -> None:
        self._forget_client(client, cast(m.Goodbye, packet.message).reason, now)

    def _watch_client(self, client: ClientSession) -> None:
        def check(now: float) -> None:
            if self.clients.get(client.id) is not client:
                return
            if now < client.last_seen + self.config.liveness_s:
                self._expire(client, now)
                self._watch_client(client)
            else:
                self._forget_client(client, f"silent for {now - client.last_seen:.1f} s", now)

        self._at(client.last_seen + self.config.liveness_s, check)

    def _forget_client(self, client: ClientSession, reason: str, now: float) -> None:
        del self.clients[client.id]
        if client.connection is not None:
            del self.client_connections[client.connection]
        for request_id in list(client.requests):
            self._drop(self.entries[request_id], cancel=True)
        self.room.forget(client.id)
        self._log("info", "client_left", client=client.id, reason=reason)

    # -- requests -------------------------------------------------------------------------------

    def _request(self, client: ClientSession, packet: Packet, now: float) -> None:
        request = cast(m.Request, packet.message)
        if (request.id.client, request.id.incarnation) != (client.id, client.incarnation):
            self._log("warning", "foreign_request", client=client.id, request=str(request.id))
            return
        key = request.id
        held = self.answers.get(key)
        entry = self.entries.get(key)
        if held is not None:
            self.counters["answered_again"] += 1
            self.room.owe(key, request.n_tokens, held.nbytes)
            self._forward(Side.CLIENT, client.connection, held)
        elif entry is not None:
            self._asked_again(entry, packet, client, now)
        elif len(client.requests) >= self.config.window:
            text = (
                f"{len(client.requests)} requests are under way, the window is {self.config.window}"
            )
            self._answer(client, m.Failure(request.id, "over_window", text))
        else:
            entry = Entry(request, packet, client.job, now, now + request.ttl_s)
            self.entries[key] = entry
            client.requests.add(request.id)
            self.counters["requests"] += 1
            self._route(entry, now)

    def _asked_again(self, entry: Entry, packet: Packet, client: ClientSession, now: float) -> None:
        self.counters["resends"] += 1
        entry.expires_at = now + cast(m.Request, packet.message).ttl_s
        if entry.packet is None:  # a worker brought it along from before a restart
            entry.packet, entry.request, entry.job = (
                packet,
                cast(m.Request, packet.message),
                client.job,
            )
            client.requests.add(entry.id)
        if entry.id in self.mappingless.get(entry.request.mapping_id, {}):
            self._answer(client, m.MappingWanted(entry.request.mapping_id))

    def _route(self, entry: Entry, now: float, *, again: bool = False) -> None:
        """Put an entry where it has to wait: for a pool, for its mapping, or for a worker."""
        pool = self._pool_of(entry)
        if pool is None:
            entry.poolless_since = now
            self.poolless[entry.id] = entry
            self._watch_poolless(now + self.config.model_grace_s)
            return
        entry.pool = pool.description.model
        mapping = entry.request.mapping_id
        if mapping and mapping not in self.mappings:
            waiting = self.mappingless.setdefault(mapping, {})
            waiting[entry.id] = entry
            if (client := self.clients.get(entry.client)) is not None:
                self._answer(client, m.MappingWanted(mapping))
            return
        pool.queue.push(entry, again=again)
        self._dispatch(pool, now)

    def _pool_of(self, entry: Entry) -> Pool | None:
        model = entry.pool or entry.request.model
        if model:
            return self.pools.get(model)
        return next(iter(self.pools.values())) if len(self.pools) == 1 else None

    def _watch_poolless(self, when: float) -> None:
        """One timer for all, so that requests that come and are cancelled leave none behind."""
        if not self._watches_poolless:
            self._watches_poolless = True
            self._at(when, self._still_poolless)

    def _still_poolless(self, now: float) -> None:
        """Where there are workers, but for long none for a request, its model is an error."""
        self._watches_poolless = False
        grace_s = self.config.model_grace_s
        if self.pools:
            due = [e for e in self.poolless.values() if e.poolless_since + grace_s <= now]
            for entry in due:
                self._fail_unknown_model(entry, now)
        if self.poolless:
            first = min(entry.poolless_since for entry in self.poolless.values())
            self._watch_poolless(first + grace_s if first + grace_s > now else now + grace_s)

    def _fail_unknown_model(self, entry: Entry, now: float) -> None:
        wanted = entry.request.model
        there = ", ".join(sorted(self.pools))
        text = (
            f"no worker serves the model {wanted!r}; the models here are: {there}"
            if wanted
            else f"the request names no model and the broker has several: {there}; name one"
        )
        self._finish(entry, encode(m.Failure(entry.id, "unknown_model", text)), now)

    def _expire(self, client: ClientSession, now: float) -> None:
        """Answer what nobody wants any more. The client keeps the exact deadline itself."""
        for entry in [self.entries[request_id] for request_id in client.requests]:
            if now >= entry.expires_at:
                self.counters["expired"] += 1
                waited = f"nobody answered within {now - entry.accepted_at:.1f} s"
                story = "; ".join([waited, *entry.story])
                self._finish(entry, encode(m.Failure(entry.id, "expired", story)), now)

    def _cancel(self, client: ClientSession, packet: Packet, now: float) -> None:
        request_id = cast(m.Cancel, packet.message).id
        if request_id.client == client.id:
            self.answers.discard(request_id)
            self.room.free(request_id)
        entry = self.entries.get(request_id)
        if entry is not None and request_id in client.requests:
            self._drop(entry, cancel=True)

    def _acknowledged(self, client: ClientSession, packet: Packet, now: float) -> None:
        for request_id in cast(m.Received, packet.message).ids:
            if request_id.client == client.id:
                self.answers.discard(request_id)
                self.room.free(request_id)

    def _mapping_offer(self, client: ClientSession, packet: Packet, now: float) -> None:
        offer = cast(m.MappingOffer, packet.message)
        content = mapping_id(offer.vocab_size, packet.payload)
        if content != offer.mapping_id:
            self.counters["bad_messages"] += 1
            self._log(
                "warning", "false_mapping", client=client.id, said=offer.mapping_id, is_=content
            )
            return
        self.mappings.put(offer.mapping_id, packet, now)
        for entry in self.mappingless.pop(offer.mapping_id, {}).values():
            if offer.mapping_id in self.mappings:
                self._route(entry, now)
            else:  # asking for it again would never end
                limit = self.config.held_mapping_bytes
                text = f"the vocab mapping has {packet.nbytes} bytes, this broker keeps {limit}"
                self._finish(entry, encode(m.Failure(entry.id, "too_large", text)), now)

    # -- workers --------------------------------------------------------------------------------

    def _worker_hello(self, connection: bytes, packet: Packet, now: float) -> None:
        hello = cast(m.WorkerHello, packet.message)
        before = self.workers.get(hello.worker)
        if before is not None and hello.incarnation < before.incarnation:
            self._send(Side.WORKER, connection, _fenced(hello.worker, hello, before))
            return
        pool = self.pools.get(hello.model.model)
        if pool is not None and pool.description.identity() != hello.model.identity():
            self._refuse_model(connection, hello, pool)
            return
        if before is not None:
            self._rejoin_or_replace(before, hello, now)
        if pool is None or hello.model.model not in self.pools:
            pool = self.pools[hello.model.model] = Pool(hello.model)
        worker = WorkerSession(
            hello.worker, hello.incarnation, hello.model.model, connection, hello.credits, now
        )
        if before is not None:
            worker.seconds_per_token = before.seconds_per_token
        self.workers[worker.id] = pool.workers[worker.id] = worker
        self.worker_connections[connection] = worker
        self._send(Side.WORKER, connection, self._welcome(0))
        self._log(
            "info", "worker_joined", worker=worker.id, model=worker.model, credits=worker.credits
        )
        self._acquit(worker, now)
        self._adopt(worker, hello.held, now)
        pool.free.put(worker)
        self._watch_worker(worker)
        for entry in list(self.poolless.values()):
            if self._pool_of(entry) is not None:
                del self.poolless[entry.id]
                self._route(entry, now)
        self._dispatch(pool, now)

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
        self._send(Side.WORKER, connection, m.Refused("other_model", text))
        self._log("warning", "worker_refused", worker=hello.worker, reason=text)

    def _rejoin_or_replace(self, before: WorkerSession, hello: m.WorkerHello, now: float) -> None:
        """The same worker again: on a new connection, or in a new life."""
        if hello.incarnation > before.incarnation:
            self._send(Side.WORKER, before.connection, _fenced(before.id, before, hello))
            self._lose_worker(before, "a newer life of it said hello", now, Blame.GUILTY)
            return
        for request_id in hello.held:  # still its own: not lost, and adopted below
            before.running.pop(request_id, None)
            if (entry := self.entries.get(request_id)) is not None:
                entry.workers.discard(before.id)
        reason = "it reconnected and no longer has the request"
        self._lose_worker(before, reason, now, Blame.NONE)

    def _adopt(self, worker: WorkerSession, held: Iterable[m.RequestId], now: float) -> None:
        """Take over what a worker still works on from before a reconnect or a restart of ours."""
        for request_id in held:
            entry = self.entries.get(request_id)
            if entry is None and request_id not in self.answers:
                request = m.Request(request_id, "generate", worker.model, 0, 0, "", "", 0.0, ())
                entry = self.entries[request_id] = Entry(request, None, "", now, now)
            if entry is not None:
                self._unqueue(entry)
                entry.pool = worker.model
                entry.workers.add(worker.id)
            worker.running[request_id] = now

    def _worker_heartbeat(self, worker: WorkerSession, packet: Packet, now: float) -> None:
        worker.direct = cast(m.Heartbeat, packet.message).direct
        self._send(Side.WORKER, worker.connection, m.Heartbeat(len(self.workers)))

    def _worker_goodbye(self, worker: WorkerSession, packet: Packet, now: float) -> None:
        self._lose_worker(worker, cast(m.Goodbye, packet.message).reason, now, Blame.NONE)

    def _draining(self, worker: WorkerSession, packet: Packet, now: float) -> None:
        worker.draining = True
        self.pools[worker.model].free.put(worker)
        self._log("info", "worker_draining", worker=worker.id, running=len(worker.running))

    def _watch_worker(self, worker: WorkerSession) -> None:
        def check(now: float) -> None:
            if self.workers.get(worker.id) is not worker:
                return
            if now < worker.last_seen + self.config.liveness_s:
                self._watch_worker(worker)
            else:
                reason = f"silent for {now - worker.last_seen:.1f} s"
                self._lose_worker(worker, reason, now, Blame.SUSPECT)

        self._at(worker.last_seen + self.config.liveness_s, check)

    def _lose_worker(self, worker: WorkerSession, reason: str, now: float, blame: Blame) -> None:
        """Forget a worker; what it was working on goes back to the head of the queue.

        ``blame`` says whether its requests may have taken it down.
        """
        del self.workers[worker.id]
        del self.worker_connections[worker.connection]
        pool = self.pools[worker.model]
        del pool.workers[worker.id]
        pool.free.discard(worker)
        self._log(
            "info", "worker_left", worker=worker.id, reason=reason, running=len(worker.running)
        )
        for request_id, since in worker.running.items():
            entry = self.entries.get(request_id)
            if entry is None or worker.id not in entry.workers:
                continue
            entry.workers.discard(worker.id)
            entry.story.append(f"worker {worker.id} had it for {now - since:.1f} s: {reason}")
            if blame is Blame.SUSPECT:
                entry.suspects[worker.id] = worker.incarnation
                self.bereft[entry.id] = entry
            self._retry(entry, "" if blame is Blame.NONE else worker.id, "lost_workers", now)
        self._close_pool(pool, now)

    def _close_pool(self, pool: Pool, now: float) -> None:
        """A pool that has lost its last worker stays while requests wait for another."""
        name = pool.description.model
        if pool.workers or self.pools.get(name) is not pool:
            return
        if any(entry.pool == name for entry in self.entries.values()):
            self._at(now + self.config.liveness_s, lambda now: self._close_pool(pool, now))
        else:
            del self.pools[name]

    def _retry(self, entry: Entry, failed_on: str, code: str, now: float) -> None:
        """Queue an entry again after an attempt that failed, unless it has failed too often.

        ``failed_on`` is the worker, or nothing when the attempt is not the request's fault.
        """
        if failed_on:
            entry.failed_on.append(failed_on)
        if entry.workers or entry.packet is None or len(entry.failed_on) < self.config.max_losses:
            self._queue_again(entry, now)
        elif entry.suspects:
            due = self.suspected[entry.id] = now + self.config.liveness_s
            self._at(due, lambda now: self._judge(entry, due, code, now))
        else:
            self._give_up(entry, code, now)

    def _judge(self, entry: Entry, due: float, code: str, now: float) -> None:
        """Whoever was cut off has had the time to come back."""
        if self.suspected.get(entry.id) == due:
            self._give_up(entry, code, now)

    def _acquit(self, worker: WorkerSession, now: float) -> None:
        """The worker is back in the same life, so no request has taken it down."""
        for entry in list(self.bereft.values()):
            if entry.suspects.pop(worker.id, None) != worker.incarnation:
                continue
            entry.failed_on.remove(worker.id)
            if entry.id in self.suspected and len(entry.failed_on) < self.config.max_losses:
                del self.suspected[entry.id]
                self._queue_again(entry, now)

    def _give_up(self, entry: Entry, code: str, now: float) -> None:
        story = f"given up after {len(entry.failed_on)} attempts: " + "; ".join(entry.story)
        self._finish(entry, encode(m.Failure(entry.id, code, story)), now)

    def _queue_again(self, entry: Entry, now: float) -> None:
        """Put an entry before all new ones, unless it still runs elsewhere."""
        if entry.workers:
            return
        entry.hedge = ""
        self.hedged.discard(entry.id)
        self.room.free(entry.id)
        if entry.packet is None:  # its client asks again, if it is there
            self._drop(entry, cancel=False)
        else:
            self.counters["requeues"] += 1
            self._route(entry, now, again=True)

    def _reply(self, worker: WorkerSession, packet: Packet, now: float) -> None:
        """A reply or a failure came: the worker has a credit again, the client its answer."""
        message = cast(m.Reply | m.Failure, packet.message)
        since = worker.running.pop(message.id, None)
        if since is None:
            self.counters["unasked_answers"] += 1
            self._log("warning", "unasked_answer", worker=worker.id, request=str(message.id))
            return
        worker.answered += 1
        if not worker.running:
            worker.busy_until = now
        pool = self.pools[worker.model]
        pool.free.put(worker)
        entry = self.entries.get(message.id)
        if entry is None:
            self.counters["late_answers"] += 1
            self._pass_on_transfer(packet)
        else:
            entry.workers.discard(worker.id)
            self._conclude(entry, worker, packet, since, now)
        self._dispatch(pool, now)

    def _pass_on_transfer(self, packet: Packet) -> None:
        """Tell a client also of a transfer that it no longer wants: it must take it, to stay in
        step with the worker.
        """
        message = packet.message
        if isinstance(message, m.Reply) and m.comes_directly(message):
            client = self.clients.get(message.id.client)
            if client is not None and client.incarnation == message.id.incarnation:
                self._forward(Side.CLIENT, client.connection, packet)

    def _conclude(
        self, entry: Entry, worker: WorkerSession, packet: Packet, since: float, now: float
    ) -> None:
        message = packet.message
        if isinstance(message, m.Reply):
            learn_speed(worker, entry.n_tokens, message.compute_s)
            self.pools[worker.model].free.put(worker)
            self.measures.replied(entry, worker, since, message.compute_s, now)
            self.counters["replies"] += 1
            self.counters["hedges_won"] += entry.hedge == worker.id
            self.counters["direct_replies"] += message.transfer is not None
            self.counters["reply_bytes"] += packet.nbytes
            self._finish(entry, packet, now)
            return
        failure = cast(m.Failure, message)
        if failure.code == "unknown_mapping":  # its store is bounded too: tell it again
            worker.mappings.discard(entry.request.mapping_id)
            self._queue_again(entry, now)
        elif failure.code == "cancelled":  # before its client came back and asked again
            self._queue_again(entry, now)
        elif failure.code == "target_failed":
            entry.story.append(f"worker {worker.id} after {now - since:.1f} s: {failure.text}")
            self._retry(entry, worker.id, failure.code, now)
        else:
            self._finish(entry, packet, now)

    def _finish(self, entry: Entry, answer: Packet, now: float) -> None:
        """Deliver the answer, keep it until it is acknowledged, forget the request."""
        if isinstance(answer.message, m.Failure):
            self.counters["failures"] += 1
            self._log(
                "warning",
                "request_failed",
                request=str(entry.id),
                code=answer.message.code,
                text=answer.message.text,
            )
        client = self.clients.get(entry.client)
        self._drop(entry, cancel=True)
        if client is not None and client.incarnation != entry.id.incarnation:
            return
        if not m.comes_directly(answer.message):  # a transfer is not made twice
            self._hold(entry.id, answer, now)
        if client is not None:
            client.answered += 1
            if client.connection is not None and isinstance(answer.message, m.Reply):
                self.room.owe(entry.id, entry.n_tokens, answer.nbytes)
            self._forward(Side.CLIENT, client.connection, answer)

    def _hold(self, request_id: m.RequestId, answer: Packet, now: float) -> None:
        if not self._watches_answers:
            self._watches_answers = True
            self._at(now + self.config.held_answer_s, self._let_go)
        self.answers.put(request_id, answer, now)

    def _let_go(self, now: float) -> None:
        """Forget answers that nobody will ask for any more."""
        self.answers.discard_older(now - self.config.held_answer_s)
        self._watches_answers = len(self.answers) > 0
        if self._watches_answers:
            self._at(now + self.config.held_answer_s, self._let_go)

    def _drop(self, entry: Entry, *, cancel: bool) -> None:
        """Forget a request wherever it is; workers that run it are told if ``cancel``."""
        del self.entries[entry.id]
        self.bereft.pop(entry.id, None)
        self.hedged.discard(entry.id)
        self.room.free(entry.id)
        self._unqueue(entry)
        if (client := self.clients.get(entry.client)) is not None:
            client.requests.discard(entry.id)
        if cancel:
            for worker in entry.workers:
                self._send(Side.WORKER, self.workers[worker].connection, m.Cancel(entry.id))

    def _unqueue(self, entry: Entry) -> None:
        self.poolless.pop(entry.id, None)
        self.suspected.pop(entry.id, None)
        self.crowded.pop(entry.id, None)
        if parked := self.parked.get(entry.client):
            parked.pop(entry.id, None)
            if not parked:
                del self.parked[entry.client]
        mapping = entry.request.mapping_id
        if waiting := self.mappingless.get(mapping):
            waiting.pop(entry.id, None)
            if not waiting:
                del self.mappingless[mapping]
        if entry.pool:
            self.pools[entry.pool].queue.remove(entry)

    # -- scheduling -----------------------------------------------------------------------------

    def _dispatch(self, pool: Pool, now: float) -> None:
        """Give queued requests to workers with free credits."""
        while len(pool.queue) and len(pool.free):
            entry = cast(Entry, pool.queue.pop())
            mapping = entry.request.mapping_id
            if mapping and mapping not in self.mappings:  # evicted while it waited
                self._route(entry, now, again=True)
            elif not self.room.fits_client(entry.client, entry.n_tokens):
                self.parked.setdefault(entry.client, {})[entry.id] = entry
            elif not self.room.fits_total(entry.client, entry.n_tokens):
                self.crowded[entry.id] = entry
            elif worker := pool.free.choose(entry.n_tokens, now, entry.avoid):
                self._assign(entry, worker, now)

    def _unpark(self, client_id: str, now: float) -> None:
        """There is more room: who waited for it is served before all new ones."""
        while waiting := self.parked.get(client_id):
            entry = next(iter(waiting.values()))
            if not self.room.fits_client(client_id, entry.n_tokens):
                break
            self._unqueue(entry)
            self._route(entry, now, again=True)
        while self.crowded:
            entry = next(iter(self.crowded.values()))
            if not self.room.fits_total(entry.client, entry.n_tokens):
                break
            self._unqueue(entry)
            self._route(entry, now, again=True)

    def _assign(
        self, entry: Entry, worker: WorkerSession, now: float, packet: Packet | None = None
    ) -> None:
        """Give the entry to a worker; ``packet`` in place of the entry's own."""
        packet = packet or entry.packet
        assert packet is not None
        mapping = entry.request.mapping_id
        if mapping and mapping not in worker.mappings:
            self._forward(Side.WORKER, worker.connection, cast(Packet, self.mappings.get(mapping)))
            worker.mappings.add(mapping)
        worker.busy_until = expected_finish(worker, entry.n_tokens, now)
        self.measures.assigned(entry, now)
        worker.running[entry.id] = now
        self.pools[worker.model].free.put(worker)
        self.room.expect(entry.id, entry.n_tokens)
        entry.workers.add(worker.id)
        self.counters["assignments"] += 1
        self._forward(Side.WORKER, worker.connection, packet)
        if worker.seconds_per_token is not None and self.config.hedge_after and not entry.hedge:
            late_s = self.config.hedge_after * (worker.busy_until - now)
            due = now + max(late_s, self.config.hedge_floor_s)
            self._at(due, lambda now: self._hedge(entry, worker, now))

    def _hedge(self, entry: Entry, worker: WorkerSession, now: float) -> None:
        """The worker has had the entry for far too long: have another one try as well."""
        alone = self.entries.get(entry.id) is entry and entry.workers == {worker.id}
        if not alone or worker.running.get(entry.id) is None or entry.packet is None:
            return
        pool = self.pools[worker.model]
        other = pool.free.choose(entry.n_tokens, now, {*entry.avoid, worker.id})
        running = sum(len(each.running) for each in pool.workers.values())
        if other in (None, worker) or not self._may_hedge(entry, running):
            self._at(now + self.config.hedge_floor_s, lambda now: self._hedge(entry, worker, now))
            return
        self.counters["hedges"] += 1
        self._log("info", "hedged", request=str(entry.id), slow=worker.id, also=other.id)
        entry.hedge = other.id
        self.hedged.add(entry.id)
        self._assign(entry, other, now, _by_wire(entry.packet))

    def _may_hedge(self, entry: Entry, running: int) -> bool:
        mapping = entry.request.mapping_id
        can_be_told = not mapping or mapping in self.mappings
        return can_be_told and len(self.hedged) < max(1, self.config.hedge_share * running)

    # -- small things ---------------------------------------------------------------------------

    def _welcome(self, window: int) -> m.Welcome:
        limits = self.config.limits
        return m.Welcome(
            broker=self.incarnation,
            window=window,
            heartbeat_s=float(self.config.heartbeat_s),
            liveness_s=float(self.config.liveness_s),
            max_header_bytes=limits.max_header_bytes,
            max_frames=limits.max_frames,
            max_frame_bytes=limits.max_frame_bytes,
            max_request_bytes=limits.max_request_bytes,
            max_reply_bytes=limits.max_reply_bytes,
        )

    def _answer(self, client: ClientSession, message: m.Message) -> None:
        if client.connection is not None:
            self._send(Side.CLIENT, client.connection, message)

    def _send(self, side: Side, connection: bytes, message: m.Message) -> None:
        self._actions.append(Send(side, connection, encode(message).frames))

    def _forward(self, side: Side, connection: bytes | None, packet: Packet) -> None:
        if connection is not None:
            self._actions.append(Send(side, connection, packet.frames))

    def _log(self, level: str, event: str, **fields: Any) -> None:
        self._actions.append(Log(level, event, fields))

    def _at(self, when: float, call: Callable[[float], None]) -> None:
        heapq.heappush(self._timers, (when, next(self._timer_numbers), call))

    # -- to look at -----------------------------------------------------------------------------

    def __repr__(self) -> str:
        queued = sum(len(pool.queue) for pool in self.pools.values())
        running = sum(1 for entry in self.entries.values() if entry.workers)
        return (
            f"<Broker clients={len(self.clients)} workers={len(self.workers)} "
            f"queued={queued} running={running}>"
        )


def _by_wire(packet: Packet) -> Packet:
    """The same request for an answer on the wire: only one of two runs may send directly."""
    request = cast(m.Request, packet.message)
    if request.direct is None:
        return packet
    return encode(replace(request, direct=None), packet.payload)


def _fenced(name: str, old: Any, new: Any) -> m.Refused:
    text = (
        f"{name} said hello with incarnation {new.incarnation} here; incarnation "
        f"{old.incarnation} is fenced off: two processes use one name, or this one is a leftover"
    )
    return m.Refused("fenced", text)


_COUNTERS = (
    "requests",
    "assignments",
    "replies",
    "direct_replies",
    "reply_bytes",
    "failures",
    "resends",
    "answered_again",
    "requeues",
    "hedges",
    "hedges_won",
    "late_answers",
    "unasked_answers",
    "expired",
    "bad_messages",
)

_FROM_CLIENT: dict[type, Callable[..., None]] = {
    m.ClientHello: BrokerCore._client_hello,
    m.Heartbeat: BrokerCore._client_heartbeat,
    m.Goodbye: BrokerCore._client_goodbye,
    m.Request: BrokerCore._request,
    m.Cancel: BrokerCore._cancel,
    m.Received: BrokerCore._acknowledged,
    m.MappingOffer: BrokerCore._mapping_offer,
}

_FROM_WORKER: dict[type, Callable[..., None]] = {
    m.WorkerHello: BrokerCore._worker_hello,
    m.Heartbeat: BrokerCore._worker_heartbeat,
    m.Goodbye: BrokerCore._worker_goodbye,
    m.Draining: BrokerCore._draining,
    m.Reply: BrokerCore._reply,
    m.Failure: BrokerCore._reply,
}
