"""Clients: who is there, who is back, who has gone."""

from __future__ import annotations

from typing import cast

from broker.core import fencing
from broker.core.events import Side
from broker.core.ledger import Ledger, heartbeat
from broker.core.requests import Requests
from broker.core.state import ClientSession
from broker.protocol import Packet, encode, mapping_id
from broker.protocol import messages as m

#: Clients that are not connected and may come back; of more, the one that went first is forgotten.
MAX_AWAY = 16384


class Clients:
    """Keeps the sessions of clients, and hears all that clients say but their requests."""

    def __init__(self, ledger: Ledger, requests: Requests) -> None:
        self._ledger = ledger
        self._requests = requests
        #: those without a connection, the first to have lost it first
        self._away: dict[str, ClientSession] = {}

    def hello(self, connection: bytes, packet: Packet, now: float) -> None:
        """A client is there, or there again: a new life, or a new connection of the same."""
        hello = cast(m.ClientHello, packet.message)
        client = self._ledger.clients.get(hello.client)
        if client is not None and fencing.is_older(hello, client, self._ledger.incarnation):
            refusal = fencing.fenced(client.id, hello.incarnation, client.incarnation)
            self._ledger.send(Side.CLIENT, connection, refusal)
            return
        before = client
        if client is not None and hello.incarnation != client.incarnation:
            self._forget(client, "a newer life of it said hello", now)
            if client.connection not in (None, connection):
                refusal = fencing.fenced(client.id, client.incarnation, hello.incarnation)
                self._ledger.send(Side.CLIENT, client.connection, refusal)
            client = None
        if client is None:
            client = ClientSession(
                hello.client,
                hello.incarnation,
                hello.job,
                hello.rank,
                connection,
                now,
                self._ledger.admission(hello, before),
                fencing.replaced(hello, before),
            )
            self._ledger.clients[client.id] = client
            self._ledger.log(
                "info", "client_joined", client=client.id, job=client.job, rank=client.rank
            )
            self._watch(client)
        else:
            if client.connection is not None:
                del self._ledger.client_connections[client.connection]
            client.admission = self._ledger.admission(hello, client)
        client.connection = connection
        self._away.pop(client.id, None)
        client.last_seen = now
        self._ledger.client_connections[connection] = client
        self._lose_sent(client, now)
        self._ledger.welcome(Side.CLIENT, client)
        self._requests.ask_again(client)

    def disconnected(self, client: ClientSession, now: float) -> None:
        """Its connection is gone; it may come back on another."""
        assert client.connection is not None
        del self._ledger.client_connections[client.connection]
        client.connection = None
        client.last_seen = now
        self._away[client.id] = client
        self._lose_sent(client, now)
        self._ledger.log(
            "info", "client_disconnected", client=client.id, requests=len(client.requests)
        )
        if len(self._away) > MAX_AWAY:
            first = next(iter(self._away.values()))
            self._forget(first, f"it is away, and so are {MAX_AWAY} others", now)

    def replaced(self, client: ClientSession, name: str, now: float) -> None:
        """Its connection has said hello in another name."""
        self._forget(client, f"its connection goes by the name {name} now", now)

    def _lose_sent(self, client: ClientSession, now: float) -> None:
        """What was on its connection is gone with it."""
        self._requests.end_passing(client, now)
        self._ledger.reply_room.free_sent(client.id, client.requests)

    def heartbeat(self, client: ClientSession, packet: Packet, now: float) -> None:
        """It is still there; tell it whether anybody works for it."""
        client.direct = cast(m.Heartbeat, packet.message).direct
        waits = any(request_id in self._ledger.waiting_for_pool for request_id in client.requests)
        n_workers = 0 if waits else len(self._ledger.workers)
        beat = heartbeat(n_workers, self._ledger.offers())
        self._ledger.forward(Side.CLIENT, client.connection, beat)

    def goodbye(self, client: ClientSession, packet: Packet, now: float) -> None:
        """It leaves on purpose, and wants no answers any more."""
        self._forget(client, cast(m.Goodbye, packet.message).reason, now)

    def _watch(self, client: ClientSession) -> None:
        def check(now: float) -> None:
            if now < client.last_seen + self._ledger.config.liveness_s:
                self._requests.expire(client, now)
                self._watch(client)
            else:
                self._forget(client, f"silent for {now - client.last_seen:.1f} s", now)

        client.watch = self._ledger.at(client.last_seen + self._ledger.config.liveness_s, check)

    def _forget(self, client: ClientSession, reason: str, now: float) -> None:
        del self._ledger.clients[client.id]
        self._away.pop(client.id, None)
        self._ledger.timers.cancel(client.watch)
        if client.connection is not None:
            del self._ledger.client_connections[client.connection]
        for request_id in list(client.requests):
            self._requests.drop(self._ledger.entries[request_id], now, cancel=True)
        self._ledger.reply_room.forget(client.id)
        self._ledger.log("info", "client_left", client=client.id, reason=reason)

    def cancel(self, client: ClientSession, packet: Packet, now: float) -> None:
        """It no longer wants one of its requests."""
        request_id = cast(m.Cancel, packet.message).id
        if request_id.client != client.id:
            return
        self._ledger.answers.discard(request_id)
        self._ledger.reply_room.free(request_id)
        entry = self._ledger.entries.get(request_id)
        if entry is not None:
            self._requests.drop(entry, now, cancel=True)

    def acknowledged(self, client: ClientSession, packet: Packet, now: float) -> None:
        """It has these answers, so nobody asks for them again."""
        for request_id in cast(m.Received, packet.message).ids:
            if request_id.client == client.id:
                self._ledger.answers.discard(request_id)
                self._ledger.reply_room.free(request_id)
                entry = self._ledger.entries.get(request_id)
                if entry is not None and entry.passing is not None:
                    self._requests.drop(entry, now, cancel=False)

    def mapping_offer(self, client: ClientSession, packet: Packet, now: float) -> None:
        """The content of a mapping that requests wait for."""
        offer = cast(m.MappingOffer, packet.message)
        content = mapping_id(offer.vocab_size, packet.payload)
        if content != offer.mapping_id:
            self._ledger.counters["bad_messages"] += 1
            self._ledger.log(
                "warning", "false_mapping", client=client.id, said=offer.mapping_id, is_=content
            )
            return
        self._ledger.mappings.put(offer.mapping_id, packet, now)
        for entry in list(self._ledger.waiting_for_mapping.get(offer.mapping_id, {}).values()):
            if offer.mapping_id in self._ledger.mappings:
                self._requests.route(entry, now)
            else:  # asking for it again would never end
                limit = self._ledger.config.held_mapping_bytes
                text = f"the vocab mapping has {packet.nbytes} bytes, this broker keeps {limit}"
                self._requests.finish(entry, encode(m.Failure(entry.id, "too_large", text)), now)
