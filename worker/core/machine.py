"""What a worker holds, what it computes next, when it may leave.

It never decides who is served: requests are computed in the order in which brokers gave them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from broker.log_line import Log
from broker.peer.link import Arrived, Connected, Disconnected, Link, LinkState, SendTo, note_said
from broker.protocol import Packet, RemoteProtocolError, encode
from broker.protocol import messages as m
from worker.core.events import (
    Action,
    Compute,
    Computed,
    ComputeTogether,
    Drain,
    Event,
    Exit,
    Forget,
    Learn,
    TargetFree,
)
from worker.core.held import Held, Stage, together

#: Forwards whose answers may be in the making while the target goes on: one is being encoded and
#: one waits for that, so that neither side stands still for the other's last millisecond. More
#: would only take memory.
MAX_STAGED = 2
#: Without a broker for so long it is said, and again after that.
NOTICE_S, NOTICE_AGAIN_S = 3.0, 60.0


class WorkerCore:
    """One worker, linked to one or several brokers; it has ``credits`` for each of them.

    The target goes on with the next request as soon as it is free, while at most ``max_staged``
    forwards' answers are being made. ``coalesce_tokens`` is how many tokens (B*T, padded) of
    waiting requests may run in one forward; 0 has each run alone. ``note`` makes the line about
    its direct channels that heartbeats carry.
    """

    def __init__(
        self,
        worker: str,
        incarnation: int,
        description: m.ModelDescription,
        endpoints: Iterable[str],
        now: float,
        *,
        credits: int = 2,
        max_mappings: int = 16,
        drain_s: float = 30.0,
        coalesce_tokens: int = 0,
        max_staged: int = MAX_STAGED,
        note: Callable[[], str] = str,
    ) -> None:
        self.worker = worker
        self.incarnation = incarnation
        self.description = description
        self.credits = credits
        self.max_mappings = max_mappings
        self.drain_s = drain_s
        #: brokers that know of the draining: nothing more is on its way from them
        self.released: set[str] = set()
        self.coalesce_tokens = coalesce_tokens
        self.max_staged = max_staged
        self.links = {
            endpoint: Link(endpoint, self._hello_for(endpoint), now, note) for endpoint in endpoints
        }
        #: in the order of arrival, which is that of computing
        self.held: OrderedDict[m.RequestId, Held] = OrderedDict()
        #: what the target works on: nothing, one request, or several in one forward
        self.computing: tuple[m.RequestId, ...] = ()
        self._forwards = 0
        #: least recently used first
        self.mappings: OrderedDict[str, None] = OrderedDict()
        #: since when it has had no broker, or has last said so; and how long it waits to say it
        self._alone_at, self._patience_s = now, NOTICE_S
        self.leave_at: float | None = None
        self.left = False
        self._actions: list[Action] = []

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; say what to send, compute and log. ``now`` is monotonic seconds."""
        if self.left:
            return []
        self._actions = []
        if isinstance(event, Connected):
            self._actions += self.links[event.endpoint].connected(now)
        elif isinstance(event, Disconnected):
            self._actions += self.links[event.endpoint].disconnected(now, event.why)
        elif isinstance(event, Arrived):
            self._arrived(self.links[event.endpoint], event.packet, now)
        elif isinstance(event, TargetFree):
            self._target_free()
        elif isinstance(event, Computed):
            self._computed(event)
        elif isinstance(event, Drain):
            self._drain(event.reason, now)
        for link in self.links.values():
            self._actions += link.tick(now)
        self._notice(now)
        self._compute_next(now)
        self._leave_if_done(now)
        note_said(self.links, self._actions, now)
        return self._actions

    def goodbye(self) -> list[Action]:
        """Tell the brokers that this worker leaves; what it holds goes to others."""
        if self.left:
            return []
        return [action for link in self.links.values() for action in link.goodbye("stopped")]

    @property
    def next_timer(self) -> float | None:
        """When :class:`Tick` should come at the latest."""
        if self.left:
            return None
        timers = [link.next_timer for link in self.links.values()] + [self.leave_at]
        timers.append(self._alone_at + self._patience_s)
        return min((timer for timer in timers if timer is not None), default=None)

    # -- from the broker ------------------------------------------------------------------------

    def _arrived(self, link: Link, packet: Packet, now: float) -> None:
        message = packet.message
        was_ready = link.ready
        self._actions += link.received(message, now)
        if isinstance(message, m.Request):
            self._request(link, message, packet, now)
        elif isinstance(message, m.Cancel):
            self._cancel(link, message.id)
        elif isinstance(message, m.MappingOffer):
            self._learn(message.mapping_id, packet)
        elif isinstance(message, m.Draining):
            self.released.add(link.endpoint)
        elif isinstance(message, m.Refused):
            self._refused(link, message)
        if link.ready and not was_ready:
            self._welcomed(link)

    def _welcomed(self, link: Link) -> None:
        self._log("info", "attached", broker=link.broker, endpoint=link.endpoint)
        self.released.discard(link.endpoint)
        if self.leave_at is not None:
            self._send(link.endpoint, encode(m.Draining()))
        for request_id, held in list(self.held.items()):
            if link.endpoint in held.endpoints and held.answer:
                self._answer(request_id, *held.answer)

    def _request(self, link: Link, request: m.Request, packet: Packet, now: float) -> None:
        if (held := self.held.get(request.id)) is not None:
            self._asked_again(held, link, request, now)
            return
        if request.mapping_id and request.mapping_id not in self.mappings:
            text = f"this worker does not have the vocab mapping {request.mapping_id}"
            failure = encode(m.Failure(request.id, "unknown_mapping", text))
            self._send(link.endpoint, failure)
            return
        if request.mapping_id:
            self.mappings.move_to_end(request.mapping_id)
        self.held[request.id] = Held([link.endpoint], packet, now, now + request.ttl_s)

    def _asked_again(self, held: Held, link: Link, request: m.Request, now: float) -> None:
        """It is wanted (again), perhaps by a second broker: one forward answers all."""
        held.cancelled = False
        held.expires_at = now + request.ttl_s
        if link.endpoint not in held.endpoints:
            held.endpoints.append(link.endpoint)
        if held.answer:
            self._answer(request.id, *held.answer)

    def _cancel(self, link: Link, request_id: m.RequestId) -> None:
        held = self.held.get(request_id)
        if held is None or link.endpoint not in held.endpoints:
            return
        begun = held.stage in (Stage.COMPUTING, Stage.STAGED)
        if held.endpoints == [link.endpoint] and begun:
            held.cancelled = True
            return
        held.endpoints.remove(link.endpoint)
        if not held.endpoints:
            del self.held[request_id]
        text = "cancelled before the target began"
        self._send(link.endpoint, encode(m.Failure(request_id, "cancelled", text)))

    def _learn(self, mapping_id: str, packet: Packet) -> None:
        try:
            packet.verify()
        except RemoteProtocolError as error:  # its request is answered with unknown_mapping
            self._log("warning", "damaged_mapping", mapping=mapping_id, text=str(error))
            return
        if mapping_id not in self.mappings:
            self._actions.append(Learn(packet))
        self.mappings[mapping_id] = None
        self.mappings.move_to_end(mapping_id)
        needed = {held.request.mapping_id for held in self.held.values()}
        unused = [known for known in self.mappings if known not in needed and known != mapping_id]
        for oldest in unused[: max(0, len(self.mappings) - self.max_mappings)]:
            del self.mappings[oldest]
            self._actions.append(Forget(oldest))

    def _refused(self, link: Link, refusal: m.Refused) -> None:
        self._log("error", "refused", endpoint=link.endpoint, code=refusal.code, text=refusal.text)
        if all(link.state is LinkState.REFUSED for link in self.links.values()):
            self._exit(f"the broker at {link.endpoint} refused this worker: {refusal.text}")

    def _notice(self, now: float) -> None:
        """Say after some seconds that no broker welcomes this worker, and go on trying."""
        if any(link.ready for link in self.links.values()):
            self._alone_at = now
        elif now >= self._alone_at + self._patience_s:
            why = "; ".join(link.why_not_ready(now) for link in self.links.values())
            self._log("warning", "no_broker", why=why)
            self._alone_at, self._patience_s = now, NOTICE_AGAIN_S

    # -- from the target ------------------------------------------------------------------------

    def _target_free(self) -> None:
        for request_id in self.computing:
            self.held[request_id].stage = Stage.STAGED
        self.computing = ()

    def _computed(self, event: Computed) -> None:
        if event.id in self.computing:
            self._target_free()
        held = self.held[event.id]
        answer = event.answer
        if held.cancelled and not m.comes_directly(answer[0].message):
            text = "cancelled while the target ran"
            answer = (encode(m.Failure(event.id, "cancelled", text)),)
        self._answer(event.id, *answer)

    def _answer(self, request_id: m.RequestId, *answer: Packet) -> None:
        """Send the answer to every broker that waits for it; keep it for those that are away."""
        held = self.held[request_id]
        held.stage, held.answer = Stage.ANSWERED, answer
        for endpoint in list(held.endpoints):
            if self.links[endpoint].ready:
                held.endpoints.remove(endpoint)
                for packet in answer:
                    self._send(endpoint, packet)
        # A direct reply that no broker can get now is not kept: its transfer would be over.
        if not held.endpoints or m.comes_directly(answer[0].message):
            del self.held[request_id]

    def _compute_next(self, now: float) -> None:
        """Give the target the next request, or requests, if it is free and there is room behind."""
        at = [held.forward for held in self.held.values() if held.stage is Stage.STAGED]
        if self.computing or len(set(at)) >= self.max_staged:
            return
        self._drop_expired(now)
        waiting = [held for held in self.held.values() if held.stage is Stage.WAITING]
        if not waiting:
            return
        chosen = together(waiting, self.coalesce_tokens) if self.coalesce_tokens else waiting[:1]
        self._forwards += 1
        self.computing = tuple(held.request.id for held in chosen)
        for held in chosen:
            held.stage, held.forward = Stage.COMPUTING, self._forwards
        parts = tuple(Compute(held.packet, held.received_at) for held in chosen)
        self._actions.append(parts[0] if len(parts) == 1 else ComputeTogether(parts))

    def _drop_expired(self, now: float) -> None:
        """No forward for what nobody waits for; were it still wanted, it would be asked again."""
        for request_id, held in list(self.held.items()):
            if held.stage is Stage.WAITING and held.expires_at <= now:
                text = "its client's time was over before the target began"
                self._answer(request_id, encode(m.Failure(request_id, "cancelled", text)))

    # -- leaving --------------------------------------------------------------------------------

    def _drain(self, reason: str, now: float) -> None:
        if self.leave_at is not None:
            return
        self.leave_at = now + self.drain_s
        self._log("info", "draining", reason=reason, held=len(self.held), within_s=self.drain_s)
        for link in self.links.values():
            if link.ready:
                self._send(link.endpoint, encode(m.Draining()))

    def _leave_if_done(self, now: float) -> None:
        if self.leave_at is None or self.left:
            return
        reachable = {endpoint for endpoint, link in self.links.items() if link.ready}
        pending = [held for held in self.held.values() if reachable & set(held.endpoints)]
        if (pending or reachable - self.released) and now < self.leave_at:
            return
        for endpoint in reachable:
            reason = f"drained, {len(pending)} requests given back"
            self._actions += self.links[endpoint].goodbye(reason)
        self._exit("")

    def _exit(self, error: str) -> None:
        if not self.left:
            self.left = True
            self._actions.append(Exit(error))

    # -- small things ---------------------------------------------------------------------------

    def _hello_for(self, endpoint: str) -> Any:
        def hello() -> m.WorkerHello:
            held = tuple(
                request_id for request_id, held in self.held.items() if endpoint in held.endpoints
            )
            return m.WorkerHello(
                self.worker,
                self.incarnation,
                self.description,
                self.credits,
                held,
                self.links[endpoint].admission,
            )

        return hello

    def _send(self, endpoint: str, packet: Packet) -> None:
        self._actions.append(SendTo(endpoint, packet))

    def _log(self, level: str, event: str, **fields: Any) -> None:
        self._actions.append(Log(level, event, fields))

    def __repr__(self) -> str:
        attached = sum(link.ready for link in self.links.values())
        return (
            f"<Worker {self.worker} attached={attached}/{len(self.links)} held={len(self.held)}"
            f"{' draining' if self.leave_at is not None else ''}>"
        )

    def validate(self) -> None:
        """Check every invariant; raises ``AssertionError``."""
        stages = [held.stage for held in self.held.values()]
        for held in self.held.values():
            assert held.endpoints
            assert set(held.endpoints) <= set(self.links)
            assert bool(held.answer) == (held.stage is Stage.ANSWERED)
            assert not held.answer or not any(self.links[e].ready for e in held.endpoints)
        begun = [i for i, held in self.held.items() if held.stage is Stage.COMPUTING]
        assert tuple(begun) == self.computing
        computing = {self.held[request_id].forward for request_id in begun}
        staged = {h.forward for h in self.held.values() if h.stage is Stage.STAGED}
        assert len(computing) <= 1
        assert len(staged) <= self.max_staged
        assert all(forward > max(staged, default=0) for forward in computing)
        # the target never waits while there is work and room for its answer
        assert Stage.WAITING not in stages or computing or len(staged) == self.max_staged
        order = [stage is Stage.WAITING for stage in stages if stage is not Stage.ANSWERED]
        assert order == sorted(order)  # nobody is overtaken
        needed = {held.request.mapping_id for held in self.held.values()}
        assert needed <= {*self.mappings, ""}
