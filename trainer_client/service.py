"""DEALER sockets as futures: one I/O thread, any number of threads that ask."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from broker.histogram import Histogram
from broker.keys.files import Role
from broker.logs import log
from broker.peer.credentials import KeyLike, credentials
from broker.peer.loop import PeerLoop
from broker.protocol import Limits, Packet, encode
from broker.protocol import messages as m
from broker.protocol.names import bounded, new_incarnation, own_name
from trainer_client.core import (
    CancelRequest,
    ClientConfig,
    ClientCore,
    Deliver,
    Fail,
    JoinChannel,
    KeepMapping,
    Log,
    Received,
    ReceiveDirectly,
    Submit,
)
from trainer_client.errors import ClientClosedError, request_error
from trainer_client.trace import Trace

if TYPE_CHECKING:
    from torch import Tensor

    from worker.direct.receiver import Receiver

_logger = logging.getLogger("draftmq.client")
_clients: weakref.WeakSet[Client] = weakref.WeakSet()


@dataclass(frozen=True)
class Answer:
    """A reply with its tensors: on the CPU, or where a direct transfer put them."""

    reply: m.Reply
    tensors: dict[str, Tensor]


class PendingReply(concurrent.futures.Future[Answer]):
    """The future of one request.

    ``result(timeout)`` raises ``TimeoutError`` when the caller's own patience ends (the request
    goes on), and a :class:`trainer_client.errors.RequestError` that tells the story when the
    request ended without a result.
    """

    def __init__(
        self,
        request_id: m.RequestId,
        on_cancel: Callable[[m.RequestId], None],
        bringer: int | None = None,
    ) -> None:
        super().__init__()
        self.request_id = request_id
        self._on_cancel = on_cancel
        #: the I/O thread's ident, which must not wait for what only it can bring
        self._bringer = bringer

    def result(self, timeout: float | None = None) -> Answer:
        """The answer; raises ``RuntimeError`` in a callback, where waiting would never end."""
        if threading.get_ident() == self._bringer and not self.done():
            raise RuntimeError(
                f"result() of request {self.request_id} was called in a callback, in the thread "
                "that would bring it; wait in a thread of your own"
            )
        return super().result(timeout)

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """Have ``fn`` called when it has ended. In the I/O thread, which has others' answers to
        deliver, what ``fn`` raises is logged, ``SystemExit`` too.
        """

        def guarded(future: Any) -> None:
            try:
                fn(future)
            except BaseException:
                if threading.get_ident() != self._bringer:
                    raise
                fields = {"request": str(self.request_id)}
                _logger.exception("callback_failed", extra={"fields": fields})

        super().add_done_callback(guarded)

    def __await__(self) -> Generator[Any, None, Answer]:
        return asyncio.wrap_future(self).__await__()

    def cancel(self) -> bool:
        """Give the request up; False when it has already ended."""
        cancelled = super().cancel()
        if cancelled:
            self._on_cancel(self.request_id)
        return cancelled


class Client:
    """A trainer's connection to one or several brokers (``tcp://host:5555``).

    ``name`` identifies this client for ever and must be its own; a second process with the same
    name fences the first off, which is what a restarted rank wants. ``job`` groups the ranks of one
    training run, whose ``step`` numbers order their requests. ``direct`` moves tensors past the
    brokers where it can; without it everything comes by wire. A ``trace`` is told of each reply.

    ``key`` (a file) and ``broker_key`` (a file, or the key's text; one for all brokers or one for
    each) are for brokers that want keys; see :func:`broker.peer.credentials.credentials`.

    It may be used from several threads. After a fork the child must make a client of its own: the
    parent's raises :class:`ClientClosedError` there and does nothing else.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        name: str | None = None,
        job: str = "",
        rank: int = 0,
        config: ClientConfig | None = None,
        direct: Receiver | None = None,
        trace: Trace | None = None,
        key: KeyLike | None = None,
        broker_key: KeyLike | Sequence[KeyLike] | None = None,
    ) -> None:
        if not endpoints:
            raise ValueError("a client needs at least one broker endpoint, like tcp://host:5555")
        shown = credentials(Role.TRAINER, endpoints, key, broker_key, _logger)
        name = name or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.name = own_name(name, shown.fingerprint)
        self.core = ClientCore(
            self.name,
            new_incarnation(),
            endpoints,
            time.monotonic(),
            job=bounded(job),
            rank=rank,
            config=config,
            note=direct.summary if direct is not None else str,
        )
        self._direct = direct
        #: from submission to arrival
        self.reply_s = Histogram()
        self._trace = trace
        self._pending: dict[m.RequestId, PendingReply] = {}
        self._lock = threading.Lock()
        self._closed = ""
        self._loop = PeerLoop(
            "draftmq-client", self.core, self._perform, self._fail_all, _logger, shown.curves
        )
        self._loop.start()
        _clients.add(self)

    # -- asking ---------------------------------------------------------------------------------

    def submit(
        self,
        operation: str,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        timeout_s: float,
        model: str = "",
        step: int = 0,
        n_tokens: int = 0,
        mapping_id: str = "",
        encoding: str = "",
        offer: str = "",
        avoid: str = "",
    ) -> PendingReply:
        """Send a request as soon as a broker has room for it. A worker to ``avoid`` gets it only
        where there is no other.

        Raises :class:`LocalProtocolError` for what could not be sent, and
        :class:`ClientClosedError` after :meth:`close`.
        """
        manifest: tuple[m.TensorSpec, ...] = ()
        payload: list[Any] = []
        if tensors:
            from broker.peer.tensors import to_frames

            manifest, payload = to_frames(tensors)
        request_id = self.core.new_id()
        request = m.Request(
            id=request_id,
            operation=operation,
            model=model,
            step=step,
            n_tokens=n_tokens,
            mapping_id=mapping_id,
            encoding=encoding,
            ttl_s=float(timeout_s),
            manifest=manifest,
            direct=self._direct.offer if self._direct is not None else None,
            offer=offer,
            avoid=avoid,
        )
        packet = encode(request, payload, self._limits())
        pending = PendingReply(request_id, self._cancel, self._loop.ident)
        with self._lock:
            self._raise_if_closed()
            self._pending[request_id] = pending
        self._loop.post(Submit(packet, time.monotonic() + timeout_s))
        return pending

    def keep_mapping(self, offer: Packet) -> None:
        """Offer this vocab mapping to every broker that asks for it."""
        self._raise_if_closed()
        self._loop.post(KeepMapping(offer))

    def offers(self) -> dict[str, tuple[str, ...]]:
        """What the workers of each attached broker serve, as it last said; from any thread."""
        links = self.core.links
        return {endpoint: link.offers for endpoint, link in links.items() if link.ready}

    @property
    def connecting(self) -> bool:
        """Whether a broker is still to be heard of, and nothing says why it should not be."""
        links = self.core.links.values()
        return any(not link.ready and not link.trouble for link in links)

    @property
    def window(self) -> int:
        """Unanswered requests that the attached brokers allow, all together."""
        return sum(link.window for link in self.core.links.values() if link.ready)

    def counters(self) -> dict[str, int]:
        """Requests, replies, resends and the like, since the client began."""
        return dict(self.core.counters)

    def snapshot(self) -> dict[str, Any]:
        """What ``/status`` and ``/metrics`` of a trainer show of its client; from any thread."""
        return {
            "client": self.name,
            "brokers": {endpoint: link.state.value for endpoint, link in self.core.links.items()},
            "unfinished": len(self.core.tickets),
            "unsent": len(self.core.waiting),
            "counters": self.counters(),
            "reply_s": self.reply_s.plain(),
        }

    # -- ending ---------------------------------------------------------------------------------

    def close(self) -> None:
        """End this client. Its unfinished requests fail; brokers and workers go on."""
        if not self._closed:
            self._end("this client is closed")
            self._loop.stop()
            if self._direct is not None:
                self._direct.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self.core)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a client has sockets and a thread and cannot be pickled; make one in each process"
        )

    # -- inside ---------------------------------------------------------------------------------

    def _limits(self) -> Limits:
        return min(
            (link.limits for link in self.core.links.values()),
            key=lambda limits: limits.max_request_bytes,
        )

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise ClientClosedError(self._closed)

    def _cancel(self, request_id: m.RequestId) -> None:
        with self._lock:
            if self._closed:
                return
            self._pending.pop(request_id, None)
        self._loop.post(CancelRequest(request_id))

    def _perform(self, action: Any) -> None:
        if isinstance(action, Log):
            log(_logger, action.level, action.event, action.fields)
        elif isinstance(action, (JoinChannel, ReceiveDirectly)):
            self._perform_directly(action)
        else:
            self._end_request(action)

    def _perform_directly(self, action: JoinChannel | ReceiveDirectly) -> None:
        if isinstance(action, JoinChannel):
            if self._direct is not None:
                self._direct.invited(action.worker, action.invitation)
            return
        request_id = action.reply.id

        def done(tensors: dict[str, Tensor] | None, why: str) -> None:
            self._loop.post(Received(request_id, tensors, why))

        if self._direct is not None:
            self._direct.receive(action.reply, done)
        else:
            done(None, "this client takes the wire only")

    def _end_request(self, action: Deliver | Fail) -> None:
        with self._lock:
            pending = self._pending.pop(action.id, None)
        if pending is None or not pending.set_running_or_notify_cancel():
            return
        if isinstance(action, Fail):
            pending.set_exception(request_error(action.code, f"request {action.id}: {action.text}"))
        else:
            try:
                answer = _answer(action)
            except Exception as error:
                text = f"request {action.id}: its answer came and cannot be used: {error!r}"
                pending.set_exception(request_error("unusable", text))
                return
            pending.set_result(answer)
            self.reply_s.observe(action.arrived_at - action.submitted_at)
            if self._trace is not None:
                self._trace.delivered(action, time.monotonic())

    def _fail_all(self, error: BaseException) -> None:
        self._end(f"this client's I/O thread broke: {error!r}; make a new client")

    def _end(self, why: str) -> None:
        with self._lock:
            self._closed = self._closed or why
            unfinished = list(self._pending.values())
            self._pending.clear()
        for pending in unfinished:
            if pending.set_running_or_notify_cancel():
                pending.set_exception(ClientClosedError(f"{why}; its answer had not come"))

    def _abandon_after_fork(self) -> None:
        self._lock = threading.Lock()
        self._closed = (
            "this client belongs to the parent process; make a new one after the fork "
            "(in a DataLoader, make it in the training process, not in its workers)"
        )
        for pending in self._pending.values():
            pending._condition = threading.Condition()
            pending.set_exception(ClientClosedError(self._closed))
        self._pending.clear()


def _answer(delivered: Deliver) -> Answer:
    reply = delivered.packet.message
    assert isinstance(reply, m.Reply)
    if delivered.tensors is not None:
        return Answer(reply, delivered.tensors)
    if not reply.manifest:
        return Answer(reply, {})
    from broker.peer.tensors import from_octets

    return Answer(reply, from_octets(reply.manifest, delivered.octets))


def _close_all() -> None:
    for client in list(_clients):
        client.close()


def _abandon_all() -> None:
    for client in list(_clients):
        client._abandon_after_fork()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_abandon_all)
