"""The thread that owns a peer's sockets: workers and trainer clients run their cores in one."""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, Protocol

import zmq

from broker.peer.link import Arrived, Connected, Disconnected, Link, Reopen, SendTo, Tick
from broker.protocol import messages as m
from broker.protocol.errors import RemoteProtocolError, VersionMismatchError
from broker.protocol.wire import Packet, decode, encode
from broker.transport.allocator import adapt_allocator
from broker.transport.dealer import Dealer
from broker.transport.sockets import Curve, Waiter, Wakeup

#: Messages taken from one broker before the others, and what waits here, get a turn.
_BATCH = 64


class PeerCore(Protocol):
    """What the loop needs of a core."""

    @property
    def links(self) -> Mapping[str, Link]: ...

    @property
    def next_timer(self) -> float | None: ...

    def handle(self, event: Any, now: float) -> Iterable[Any]: ...

    def goodbye(self) -> Iterable[Any]: ...


def lost_message(link: Link) -> Packet:
    """What stands for a message that came damaged: it may have been anything, and after another
    hello both sides know again what the other has.
    """
    return encode(m.HelloWanted(link.broker))


class PeerLoop:
    """Runs a core on DEALER sockets, one for each endpoint, in a daemon thread.

    ``perform`` carries out, in that thread, the actions that are not about sockets; ``failed`` is
    told if the loop itself breaks. ``curves`` has the keys for each endpoint, or nothing where the
    connections are not encrypted. Events from other threads come in by :meth:`post`. :meth:`stop`
    ends the loop and closes the sockets; what is queued then has ``linger_s`` to leave, so that no
    buffer is freed while libzmq sends it.
    """

    def __init__(
        self,
        name: str,
        core: PeerCore,
        perform: Callable[[Any], None],
        failed: Callable[[BaseException], None],
        logger: logging.Logger,
        curves: Mapping[str, Curve] | None = None,
    ) -> None:
        self.core = core
        self._curves = curves or {}
        self._perform = perform
        self._failed = failed
        self._logger = logger
        self._posted: collections.deque[Any] = collections.deque()
        self._wakeup = Wakeup()
        self._stopping = False
        self._linger_s = 0.0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        adapt_allocator()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealers = {
            endpoint: Dealer(self._context, endpoint, self._curves.get(endpoint), self._wakeup.set)
            for endpoint in self.core.links
        }
        self._thread.start()

    @property
    def ident(self) -> int | None:
        """The ident of the thread that runs this loop."""
        return self._thread.ident

    def post(self, event: Any) -> None:
        """Hand an event to the core, from any thread."""
        self._posted.append(event)
        self._wakeup.set()

    def stop(self, linger_s: float = 1.0) -> None:
        """End the loop, from any thread; returns when the sockets are closed."""
        self._linger_s = linger_s
        self._stopping = True
        self._wakeup.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            waiter, generation = self._new_waiter(), self._generation
            while True:
                if self._generation != generation:
                    waiter, generation = self._new_waiter(), self._generation
                timer = self._next_timer()
                ready = waiter.wait(timer, time.monotonic())
                if self._wakeup in ready:
                    self._wakeup.clear()
                while self._posted:
                    self._handle(self._posted.popleft())
                for dealer in self._dealers.values():
                    if why := dealer.advance(time.monotonic()):
                        self._disconnected(dealer.endpoint, why)
                    self._read(dealer, ready)
                if timer is not None and time.monotonic() >= timer:
                    self._notice_progress()
                    self._handle(Tick())
                if self._stopping:
                    self._act(self.core.goodbye())
                    return
        except BaseException as error:  # whatever ends this thread ends what waits for it
            self._logger.exception("loop_failed")
            self._failed(error)
        finally:
            for dealer in self._dealers.values():
                dealer.close(self._linger_s)
            self._context.term()
            self._wakeup.close()

    def _notice_progress(self) -> None:
        for endpoint, dealer in self._dealers.items():
            if dealer.moving():
                self.core.links[endpoint].moving(time.monotonic())

    @property
    def _generation(self) -> int:
        return sum(dealer.generation for dealer in self._dealers.values())

    def _next_timer(self) -> float | None:
        timers = [self.core.next_timer, *(dealer.next_at for dealer in self._dealers.values())]
        return min((timer for timer in timers if timer is not None), default=None)

    def _new_waiter(self) -> Waiter:
        dealers = self._dealers.values()
        sockets = [dealer.socket for dealer in dealers if dealer.socket is not None]
        monitors = [dealer.monitor for dealer in dealers if dealer.monitor is not None]
        return Waiter(self._wakeup, sockets, monitors)

    def _read(self, dealer: Dealer, ready: Container[object]) -> None:
        if dealer.monitor is not None and dealer.monitor.socket in ready:
            self._read_changes(dealer)
        if dealer.socket in ready:
            self._read_messages(dealer)

    def _read_changes(self, dealer: Dealer) -> None:
        endpoint = dealer.endpoint
        for up, why in dealer.changes():
            if up:
                self._handle(Connected(endpoint))
            else:
                self._disconnected(endpoint, why)

    def _read_messages(self, dealer: Dealer) -> None:
        endpoint = dealer.endpoint
        for _ in range(_BATCH):
            frames = dealer.receive()
            if frames is None:
                return
            try:
                packet = decode(frames, self.core.links[endpoint].limits)
            except VersionMismatchError as error:
                packet = encode(m.Refused("version", str(error)))
            except RemoteProtocolError as error:
                fields = {"endpoint": endpoint, "error": str(error)}
                self._logger.warning("bad_message", extra={"fields": fields})
                packet = lost_message(self.core.links[endpoint])
            self._handle(Arrived(endpoint, packet))
            if isinstance(packet.message, m.Welcome):
                dealer.worked()

    def _disconnected(self, endpoint: str, why: str) -> None:
        if why and why != self.core.links[endpoint].trouble:
            self._logger.warning("cannot_connect", extra={"fields": {"why": why}})
        self._handle(Disconnected(endpoint, why))

    def _handle(self, event: Any) -> None:
        self._act(self.core.handle(event, time.monotonic()))

    def _act(self, actions: Iterable[Any]) -> None:
        for action in actions:
            if isinstance(action, SendTo):
                self._dealers[action.endpoint].send(action.packet.frames)
            elif isinstance(action, Reopen):
                if why := self._dealers[action.endpoint].reopen():
                    self._disconnected(action.endpoint, why)
            else:
                self._perform(action)
