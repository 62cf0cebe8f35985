"""The broker's sockets and timers around its core."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict
from types import TracebackType
from typing import Any, cast
from urllib.parse import urlsplit

import zmq

from broker.core import (
    Action,
    BadBytes,
    BrokerConfig,
    BrokerCore,
    ConnectionLost,
    Event,
    Log,
    Received,
    Send,
    Side,
    Tick,
)
from broker.core.inspect import snapshot
from broker.errors import BrokerError
from broker.http import HttpServer
from broker.logs import log
from broker.pages import pages
from broker.protocol import RemoteProtocolError, VersionMismatchError, decode
from broker.protocol.sockets import Monitor, Wakeup, configure, poll

_logger = logging.getLogger("draftmq.broker")
#: Messages taken from one socket before the other gets a turn.
_BATCH = 64
#: What a stopping broker waits for its goodbyes to leave.
_LINGER_S = 0.5


class Broker:
    """A broker in a thread of this process.

    Endpoints are ``tcp://HOST:PORT`` (port 0 takes a free one) or ``ipc://PATH``; ``http`` is
    ``HOST:PORT`` or None. Raises :class:`BrokerError` from :meth:`start` where an address cannot be
    bound, or is open to others without ``insecure``.
    """

    def __init__(
        self,
        clients: str = "tcp://127.0.0.1:0",
        workers: str = "tcp://127.0.0.1:0",
        http: str | None = None,
        config: BrokerConfig | None = None,
        *,
        insecure: bool = False,
    ) -> None:
        self._addresses = {Side.CLIENT: clients, Side.WORKER: workers}
        self._http_address = http
        self._insecure = insecure
        self.core = BrokerCore(uuid.uuid4().hex[:12], config)
        self._began_at = time.monotonic()
        self._lock = threading.Lock()  # the core belongs to the loop; HTTP only looks, under it
        #: the loop ended on an error of its own; it is in the log
        self.failed = False
        self._stopping = threading.Event()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._wakeup = Wakeup()
        self._ports: dict[Side, _Port] = {}
        self._http: HttpServer | None = None

    # -- life -----------------------------------------------------------------------------------

    def start(self) -> Broker:
        """Bind, and begin to serve. Peers that waited for the address are served at once."""
        for address in self._addresses.values():
            _refuse_open_address(address, self._insecure)
        if self._http_address is not None:
            _refuse_open_address(f"tcp://{self._http_address}", self._insecure)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.max_sockets = 65536
        try:
            for side, address in self._addresses.items():
                self._ports[side] = _Port(self._context, side, address, self.core.config)
            if self._http_address is not None:
                self._http = HttpServer(self._http_address, pages(self.snapshot, self.trace))
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

    def snapshot(self) -> dict[str, Any]:
        """What ``/status`` shows; from any thread."""
        with self._lock:
            seen = snapshot(self.core, time.monotonic())
        traffic = {
            side.value: {"received": port.received_bytes, "sent": port.sent_bytes}
            for side, port in self._ports.items()
        }
        return seen | {"uptime_s": seen["now_s"] - self._began_at, "bytes": traffic}

    def trace(self) -> dict[str, Any]:
        """What ``/trace`` shows: when the last requests passed through; from any thread."""
        with self._lock:
            last = list(self.core.measures.last)
        return {"broker": self.core.incarnation, "requests": [asdict(times) for times in last]}

    def __repr__(self) -> str:
        with self._lock:
            return repr(self.core)

    # -- the loop -------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wakeup.reader, zmq.POLLIN)
        for port in self._ports.values():
            poller.register(port.socket, zmq.POLLIN)
            poller.register(port.monitor.socket, zmq.POLLIN)
        try:
            while not self._stopping.is_set():
                poll(poller, self.core.next_timer, time.monotonic())
                for port in self._ports.values():
                    self._handle(port.events())
                self._handle([Tick()])
            self._act(self.core.goodbye())
        except Exception:
            self.failed = True
            _logger.exception("broker_failed")
        finally:
            self._close()
            self._stopped.set()

    def _handle(self, events: Iterable[Event]) -> None:
        for event in events:
            with self._lock:
                actions = self.core.handle(event, time.monotonic())
            self._act(actions)

    def _act(self, actions: list[Action]) -> None:
        gone = []
        for action in actions:
            if isinstance(action, Log):
                log(_logger, action.level, action.event, action.fields)
            elif not self._ports[action.side].send(action):
                gone.append(ConnectionLost(action.side, action.connection))
        if gone:
            self._handle(gone)

    def _close(self) -> None:
        if self._http is not None:
            self._http.stop()
        for port in self._ports.values():
            port.close()
        self._context.term()
        self._wakeup.close()


class _Port:
    """One ROUTER socket, with what its transport says of lost connections.

    Connections are named by the ROUTER, not by the peers, so nobody can take another's name. A
    closed TCP connection is known at once: the monitor names its file descriptor, and so does
    each message that came from it.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        side: Side,
        address: str,
        config: BrokerConfig,
    ) -> None:
        self.side = side
        self.limits = config.limits
        self.socket = context.socket(zmq.ROUTER)
        configure(self.socket, config.limits)
        self.socket.router_mandatory = True
        self.socket.backlog = 4096
        self.monitor = Monitor(self.socket, zmq.EVENT_DISCONNECTED)
        self._by_descriptor: dict[int, bytes] = {}
        self.received_bytes = 0
        self.sent_bytes = 0
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise BrokerError(
                f"cannot listen for {side.value}s on {address!r}: {error}; "
                f"is another broker there? choose another with --{side.value}s"
            ) from error
        self.endpoint = self.socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def events(self) -> list[Event]:
        """What came, a batch at most. Losses come first: a descriptor may be in use again."""
        events: list[Event] = []
        for _, descriptor in self.monitor.read():
            if (connection := self._by_descriptor.pop(descriptor, None)) is not None:
                events.append(ConnectionLost(self.side, connection))
        for _ in range(_BATCH):
            try:
                name, *frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            self.received_bytes += sum(map(len, frames))
            events.append(self._event(name.bytes, frames))
        return events

    def _event(self, connection: bytes, frames: list[zmq.Frame]) -> Event:
        if frames:
            with contextlib.suppress(zmq.ZMQError):  # noise that passed for a ZMTP 1 peer has none
                self._by_descriptor[cast(int, frames[0].get(zmq.SRCFD))] = connection
        try:
            return Received(self.side, connection, decode(frames, self.limits))
        except RemoteProtocolError as error:
            other = isinstance(error, VersionMismatchError)
            return BadBytes(self.side, connection, str(error), other)

    def send(self, action: Send) -> bool:
        """Queue a message; False when the connection is gone."""
        try:
            self.socket.send_multipart((action.connection, *action.frames), copy=False)
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise
        self.sent_bytes += sum(map(len, action.frames))
        return True

    def close(self) -> None:
        self.monitor.close()
        self.socket.close(linger=int(1000 * _LINGER_S))


def _refuse_open_address(address: str, insecure: bool) -> None:
    """Whoever reaches an open port could train on, or feed, what is served: say so, or do not."""
    if insecure or address.startswith(("ipc://", "inproc://")):
        return
    try:
        host = urlsplit(address).hostname or ""
    except ValueError as error:
        raise BrokerError(f"{address!r} is no address: {error}; write tcp://HOST:PORT") from None
    if host not in ("127.0.0.1", "::1", "localhost"):
        raise BrokerError(
            f"{address!r} can be reached from other machines, unencrypted and by anyone; listen on "
            "127.0.0.1, or say --insecure where the network itself keeps strangers out"
        )
