"""The worker as a state machine: what it holds, what it computes next, when it may leave.

It never decides who is served: requests are computed in the order in which brokers gave them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Union

from broker.protocol import Packet, RemoteProtocolError, encode
from broker.protocol import messages as m
from broker.protocol.link import (
    Arrived,
    Connected,
    Disconnected,
    Link,
    LinkState,
    Reopen,
    SendTo,
    Tick,
)


@dataclass(frozen=True)
class Computed:
    """The target is done with a request: here is the reply, or the failure."""

    id: m.RequestId
    answer: Packet


@dataclass(frozen=True)
class Drain:
    """Finish what is held, take nothing new, then leave."""

    reason: str


Event = Union[Connected, Disconnected, Arrived, Computed, Drain, Tick]  # noqa: UP007


@dataclass(frozen=True)
class Compute:
    """Give this request, which came at ``received_at``, to the target."""

    packet: Packet
    received_at: float


@dataclass(frozen=True)
class Learn:
    """Keep the vocab mapping that this offer carries."""

    packet: Packet


@dataclass(frozen=True)
class Forget:
    """Drop a vocab mapping; it is told again when it is needed."""

    mapping_id: str


@dataclass(frozen=True)
class Exit:
    """Leave: drained, or refused by every broker (``error`` says why)."""

    error: str = ""


@dataclass(frozen=True)
class Log:
    """Something an operator may want to know."""

    level: str
    event: str
    fields: Mapping[str, Any] = field(default_factory=dict)


Action = Union[SendTo, Reopen, Compute, Learn, Forget, Exit, Log]  # noqa: UP007


@dataclass(eq=False)
class _Held:
    """A request from arrival until its answer is on its way."""

    #: the brokers that wait for the answer; several when the client failed over meanwhile
    endpoints: list[str]
    packet: Packet
    received_at: float
    cancelled: bool = False
    #: set when the target is done while a broker that waits for it cannot be reached
    answer: Packet | None = None


class WorkerCore:
    """One worker, linked to one or several brokers; it has ``credits`` for each of them.

    ``note`` makes the line about its direct channels that heartbeats carry.
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
        note: Callable[[], str] = str,
    ) -> None:
        self.worker = worker
        self.incarnation = incarnation
        self.description = description
        self.credits = credits
        self.max_mappings = max_mappings
        self.drain_s = drain_s
        self.links = {
            endpoint: Link(endpoint, self._hello_for(endpoint), now, note) for endpoint in endpoints
        }
        #: in the order of arrival; the first without an answer is what the target works on
        self.held: OrderedDict[m.RequestId, _Held] = OrderedDict()
        self.computing: m.RequestId | None = None
        #: least recently used first
        self.mappings: OrderedDict[str, None] = OrderedDict()
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
        elif isinstance(event, Computed):
            self._computed(event)
        elif isinstance(event, Drain):
            self._drain(event.reason, now)
        for link in self.links.values():
            self._actions += link.tick(now)
        self._compute_next()
        self._leave_if_done(now)
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
        elif isinstance(message, m.Refused):
            self._refused(message)
        if link.ready and not was_ready:
            self._welcomed(link)

    def _welcomed(self, link: Link) -> None:
        self._log("info", "attached", broker=link.broker, endpoint=link.endpoint)
        if self.leave_at is not None:
            self._send(link.endpoint, encode(m.Draining()))
        for request_id, held in list(self.held.items()):
            if link.endpoint in held.endpoints and held.answer is not None:
                self._answer(request_id, held.answer)

    def _request(self, link: Link, request: m.Request, packet: Packet, now: float) -> None:
        if (held := self.held.get(request.id)) is not None:
            self._asked_again(held, link, request.id)
            return
        if request.mapping_id and request.mapping_id not in self.mappings:
            text = f"this worker does not have the vocab mapping {request.mapping_id}"
            failure = encode(m.Failure(request.id, "unknown_mapping", text))
            self._send(link.endpoint, failure)
            return
        if request.mapping_id:
            self.mappings.move_to_end(request.mapping_id)
        self.held[request.id] = _Held([link.endpoint], packet, now)

    def _asked_again(self, held: _Held, link: Link, request_id: m.RequestId) -> None:
        """It is wanted (again), perhaps by a second broker: one forward answers all."""
        held.cancelled = False
        if link.endpoint not in held.endpoints:
            held.endpoints.append(link.endpoint)
        if held.answer is not None:
            self._answer(request_id, held.answer)

    def _cancel(self, link: Link, request_id: m.RequestId) -> None:
        held = self.held.get(request_id)
        if held is None or link.endpoint not in held.endpoints:
            return
        if held.endpoints == [link.endpoint] and request_id == self.computing:
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
        needed = {held.packet.message.mapping_id for held in self.held.values()}  # type: ignore[union-attr]
        unused = [known for known in self.mappings if known not in needed and known != mapping_id]
        for oldest in unused[: max(0, len(self.mappings) - self.max_mappings)]:
            del self.mappings[oldest]
            self._actions.append(Forget(oldest))

    def _refused(self, refusal: m.Refused) -> None:
        self._log("error", "refused", code=refusal.code, text=refusal.text)
        if all(link.state is LinkState.REFUSED for link in self.links.values()):
            self._exit(refusal.text)

    # -- from the target ------------------------------------------------------------------------

    def _computed(self, event: Computed) -> None:
        self.computing = None
        held = self.held[event.id]
        answer = event.answer
        if held.cancelled and not m.comes_directly(answer.message):
            answer = encode(m.Failure(event.id, "cancelled", "cancelled while the target ran"))
        self._answer(event.id, answer)

    def _answer(self, request_id: m.RequestId, answer: Packet) -> None:
        """Send the answer to every broker that waits for it; keep it for those that are away."""
        held = self.held[request_id]
        held.answer = answer
        for endpoint in list(held.endpoints):
            if self.links[endpoint].ready:
                held.endpoints.remove(endpoint)
                self._send(endpoint, answer)
        # Late news of a transfer is none.
        if not held.endpoints or m.comes_directly(answer.message):
            del self.held[request_id]

    def _compute_next(self) -> None:
        if self.computing is not None:
            return
        for request_id, held in self.held.items():
            if held.answer is None:
                self.computing = request_id
                self._actions.append(Compute(held.packet, held.received_at))
                return

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
        if pending and now < self.leave_at:
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
                self.worker, self.incarnation, self.description, self.credits, held
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
        if self.computing is not None:
            assert self.held[self.computing].answer is None
        for held in self.held.values():
            assert held.endpoints
            assert set(held.endpoints) <= set(self.links)
            assert held.answer is None or not any(self.links[e].ready for e in held.endpoints)
        waiting = [request_id for request_id, held in self.held.items() if held.answer is None]
        assert bool(waiting) == (self.computing is not None)
        assert self.computing is None or self.computing == waiting[0]
        needed = {held.packet.message.mapping_id for held in self.held.values()}  # type: ignore[union-attr]
        assert needed <= {*self.mappings, ""}
