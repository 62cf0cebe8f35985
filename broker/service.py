"""The broker's sockets and timers around its core."""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
import threading
import time
import uuid
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

import zmq

from broker.core import (
    Action,
    BadBytes,
    BrokerConfig,
    BrokerCore,
    ConnectionLost,
    Event,
    Log,
    Moving,
    Received,
    Side,
    Tick,
)
from broker.core.inspect import snapshot, validate
from broker.errors import BrokerError
from broker.keys import addresses
from broker.keys.access import REREAD_S, Access, max_connections
from broker.keys.operators import door
from broker.keys.zap import ZapHandler
from broker.logs import Throttle, log
from broker.transport.allocator import adapt_allocator
from broker.transport.port import Port
from broker.transport.sockets import Waiter, Wakeup
from broker.watch.http import HttpServer
from broker.watch.pages import pages

_logger = logging.getLogger("draftmq.broker")
#: libzmq's I/O threads where they encrypt, which takes four times as long as the rest; connections
#: are spread over them. One moves more in the clear than a network card does.
_CRYPTO_THREADS = 4
#: Lines of one event that are let through at once, and a second. Of what is not as it should be few
#: say all; a cluster of a thousand ranks may come back at once, and go.
_LINES = {"warning": (20, 1.0), "info": (2000, 10.0)}
#: A loop that has not come round for so long stands still, to those who look from outside.
_STANDS_S = 2.0


class Broker:
    """A broker in a thread of this process.

    Endpoints are ``tcp://HOST:PORT`` (port 0 takes a free one) or ``ipc://PATH``; ``http`` is
    ``HOST:PORT`` or None. ``key`` is the file of the broker's secret key and ``allow`` are files or
    directories of the public keys that may connect; they are read again when they change.
    ``http_token`` is the file of the token that HTTP wants of operators, or ``none``.

    Raises :class:`BrokerError` for keys that cannot be used, and from :meth:`start` where an
    address cannot be bound, or is open to others without keys or ``insecure``.
    """

    def __init__(
        self,
        clients: str = "tcp://127.0.0.1:0",
        workers: str = "tcp://127.0.0.1:0",
        http: str | None = None,
        config: BrokerConfig | None = None,
        *,
        insecure: bool = False,
        key: str | os.PathLike[str] | None = None,
        allow: Sequence[str | os.PathLike[str]] = (),
        http_token: str | os.PathLike[str] | None = None,
    ) -> None:
        self._insecure = insecure
        self._http_token = http_token
        self._access = Access(key, allow, insecure=insecure)
        for address in (clients, workers):
            addresses.listening(address)
        if http is not None:
            addresses.http(http)
        self._addresses = {Side.CLIENT: clients, Side.WORKER: workers}
        self._http_address = http
        self.core = BrokerCore(uuid.uuid4().hex[:12], config)
        self._began_at = time.monotonic()
        self._lock = threading.Lock()  # the core belongs to the loop; HTTP only looks, under it
        #: the loop ended on an error of its own; it is in the log
        self.failed = False
        self._stopping = threading.Event()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._wakeup = Wakeup()
        self._ports: dict[Side, Port] = {}
        self._zap: ZapHandler | None = None
        self._throttles = {level: Throttle(*lines) for level, lines in _LINES.items()}
        self._max_connections = max_connections()
        self._reread_at = 0.0
        self._reread_now = False
        #: who asked whether the loop goes round
        self._asked: collections.deque[threading.Event] = collections.deque()
        self._http: HttpServer | None = None

    # -- life -----------------------------------------------------------------------------------

    def start(self) -> Broker:
        """Bind, and begin to serve. Peers that waited for the address are served at once."""
        self._access.check_ports(*self._addresses.values())
        admits = None
        if self._http_address is not None:
            admits = door(self._http_address, self._http_token, insecure=self._insecure)
        adapt_allocator()
        threads = _CRYPTO_THREADS if self._access.keyed else 1
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(threads)
        self._context.max_sockets = 65536
        try:
            if self._access.keyed:
                self._zap = ZapHandler(self._context, self._access.find)
            for side, address in self._addresses.items():
                known: Container[bytes] = (
                    self.core.client_connections
                    if side is Side.CLIENT
                    else self.core.worker_connections
                )
                curve = self._access.curve(side)
                self._ports[side] = Port(
                    self._context, side, address, self.core.config, known, curve, self._note
                )
            if self._http_address is not None:
                shown = pages(self.snapshot, self.trace, self.alive)
                self._http = HttpServer(self._http_address, shown, admits)
                self._http.start()
        except BrokerError:
            self._close()
            raise
        self._thread = threading.Thread(target=self._run, name="draftmq-broker", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Say goodbye to all peers and close. Clients and workers wait for the next broker."""
        if self._thread is not None:
            self.stop_soon()
            self._thread.join()

    def stop_soon(self) -> None:
        """Ask the broker to stop, without waiting for it; what a signal handler may call."""
        self._stopping.set()
        self._wakeup.set()

    def reread_keys(self) -> None:
        """Read the allow-list again at once; what a signal handler may call."""
        self._reread_now = True
        self._wakeup.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the broker has stopped; False when it still runs after ``timeout_s``."""
        return self._stopped.wait(timeout_s)

    def __enter__(self) -> Broker:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def client_endpoint(self) -> str:
        """Where trainers connect."""
        return self._ports[Side.CLIENT].endpoint

    @property
    def worker_endpoint(self) -> str:
        """Where workers connect."""
        return self._ports[Side.WORKER].endpoint

    @property
    def http_address(self) -> str | None:
        """``HOST:PORT`` of the HTTP server, if there is one."""
        return self._http.address if self._http else None

    def alive(self) -> bool:
        """Whether the loop comes round within 2 s; from any thread."""
        answered = threading.Event()
        self._asked.append(answered)
        self._wakeup.set()
        return answered.wait(_STANDS_S)

    def snapshot(self) -> dict[str, Any]:
        """What ``/status`` shows; from any thread. Raises ``TimeoutError`` if the loop stands."""
        with self._looking():
            seen = snapshot(self.core, time.monotonic())
        traffic = {
            side.value: {"received": port.received_bytes, "sent": port.sent_bytes}
            for side, port in self._ports.items()
        }
        return seen | {"uptime_s": seen["now_s"] - self._began_at, "bytes": traffic}

    def trace(self) -> dict[str, Any]:
        """What ``/trace`` shows: when the last requests passed through; from any thread."""
        with self._looking():
            last = list(self.core.measures.last)
        requests = [asdict(times) | {"id": times.id._asdict()} for times in last]
        return {"broker": self.core.incarnation, "requests": requests}

    def __repr__(self) -> str:
        with self._lock:
            return repr(self.core)

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=_STANDS_S):
            raise TimeoutError("the broker's loop stands still")
        try:
            yield
        finally:
            self._lock.release()

    # -- the loop -------------------------------------------------------------------------------

    def _run(self) -> None:
        sockets = [port.socket for port in self._ports.values()]
        if self._zap is not None:
            sockets.append(self._zap.socket)
        waiter = Waiter(self._wakeup, sockets, [port.monitor for port in self._ports.values()])
        try:
            while not self._stopping.is_set():
                timer = self._next_timer()
                ready = waiter.wait(timer, time.monotonic())
                if self._wakeup in ready:
                    self._wakeup.clear()
                while self._asked:
                    self._asked.popleft().set()
                self._guard(time.monotonic(), ready)
                for port in self._ports.values():
                    self._handle(port.events(time.monotonic(), ready))
                if timer is not None and time.monotonic() >= timer:
                    self._handle([Tick()])
            self._act(self.core.goodbye())
        except Exception:
            self.failed = True
            _logger.exception("broker_failed")
        finally:
            self._close()
            self._stopped.set()

    def _next_timer(self) -> float | None:
        timers = [self.core.next_timer, *(port.next_at for port in self._ports.values())]
        if self._zap is not None:
            timers.append(self._reread_at)
        return min((timer for timer in timers if timer is not None), default=None)

    def _guard(self, now: float, ready: Container[object]) -> None:
        """Say who may connect, and see that those who no longer may are gone."""
        if self._zap is not None and self._zap.socket in ready:
            for refusal in self._zap.serve():
                why = self._access.explain(refusal)
                key = refusal.key.hex()
                self._note("key_refused", address=refusal.address, key=key, why=why)
        if self._reread_now or now >= self._reread_at:
            forced, self._reread_now = self._reread_now, False
            self._reread_at = now + REREAD_S
            if self._access.reread(forced=forced):
                for side, port in self._ports.items():
                    port.cut_revoked(functools.partial(self._access.has, side))
        surplus = sum(len(port.connections) for port in self._ports.values())
        surplus = max(0, surplus - self._max_connections)
        if not surplus and not any(port.wants_sweep(now) for port in self._ports.values()):
            return
        # where most strangers are: a flood of one port must not cost the other its newcomers
        for port in sorted(self._ports.values(), key=lambda port: -port.connections.n_strangers):
            surplus -= port.sweep(now, len(port.connections) - surplus)

    def _note(self, event: str, **fields: Any) -> None:
        """Log what strangers cause, as long as it is not too much."""
        self._tell("warning", event, fields)

    def _tell(self, level: str, event: str, fields: Mapping[str, Any]) -> None:
        left_out = self._throttles[level].left_out(event, time.monotonic())
        if left_out is not None:
            log(_logger, level, event, {**fields, **({"left_out": left_out} if left_out else {})})

    def _with_address(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The address in place of the name of a connection, which tells nobody anything."""
        shown = dict(fields)
        if "connection" in shown:
            shown["address"] = self._ports[Side(shown["side"])].address_of(shown.pop("connection"))
        return shown

    def _handle(self, events: Iterable[Event]) -> None:
        for event in events:
            try:
                with self._lock:
                    actions = self.core.handle(event, time.monotonic())
            except Exception:
                actions = self._survive(event)
            self._act(actions)

    def _survive(self, event: Event) -> list[Action]:
        """What one message raises costs its connection, and never the broker, whose books are
        looked through before it goes on. Raises ``AssertionError`` where they are not true.
        """
        fields: dict[str, Any] = {"side": "", "kind": type(event).__name__}
        if isinstance(event, Received):
            fields["kind"] = type(event.packet.message).__name__
        gone: list[Event] = []
        if isinstance(event, (Received, Moving, BadBytes, ConnectionLost)):
            address = self._ports[event.side].cut_off(event.connection)
            fields |= {"side": event.side.value, "address": address}
            gone = [ConnectionLost(event.side, event.connection)]
        _logger.exception("message_failed", extra={"fields": fields})
        with self._lock:
            self.core.counters["failed_messages"] += 1
            actions = self.core.take_actions()
            for each in gone:
                actions += self.core.handle(each, time.monotonic())
            validate(self.core)
        return actions

    def _act(self, actions: list[Action]) -> None:
        gone = []
        for action in actions:
            if isinstance(action, Log):
                shown = action.fields
                if action.level == "warning":
                    shown = self._with_address(shown)
                self._tell(action.level, action.event, shown)
            elif not self._ports[action.side].send(action):
                gone.append(ConnectionLost(action.side, action.connection))
        if gone:
            self._handle(gone)

    def _close(self) -> None:
        if self._http is not None:
            self._http.stop()
        for port in self._ports.values():
            port.close()
        if self._zap is not None:
            self._zap.close()
        self._context.term()
        self._wakeup.close()
