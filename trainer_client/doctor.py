"""From where it stands, what works: names, ports, keys, versions, workers, the direct path.

Each check is one line that says what was seen and, where something is wrong, what to do. Nothing is
trained, no model is loaded and no worker is asked for anything.
"""

from __future__ import annotations

import importlib.util
import logging
import platform
import queue
import socket
import statistics
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.request import ProxyHandler, build_opener

import zmq

from broker.keys.addresses import Address, connecting
from broker.keys.files import Role
from broker.peer.credentials import KeyLike, credentials
from broker.peer.link import Arrived, Connected, Disconnected, Link, LinkState, SendTo
from broker.peer.loop import PeerLoop
from broker.protocol import messages as m
from broker.protocol.errors import DraftmqError
from broker.protocol.names import new_incarnation, own_name
from broker.protocol.wire import VERSION, Packet, encode
from broker.transport.names import addresses_of

_logger = logging.getLogger("draftmq.doctor")

#: Patience with one port, and with a broker's welcome.
_CONNECT_S, _WELCOME_S = 3.0, 6.0
#: What is sent to see how fast the way to the broker is, and how long it may take.
_SENT_BYTES, _SENT_S = 8 << 20, 10.0
#: A model that no worker serves.
_NO_MODEL = "draftmq doctor"
#: Answers whose times make the round trip.
_ROUND_TRIPS = 5
#: Clocks may differ by so much before logs of two hosts cannot be read together.
_CLOCK_S = 2.0


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, whether it works, what was seen and what to do."""

    what: str
    good: bool
    seen: str
    advice: str = ""

    def __str__(self) -> str:
        mark = "ok  " if self.good else "FAIL"
        advice = f"; {self.advice}" if self.advice else ""
        return f"{mark} {self.what}: {self.seen}{advice}"


def examine(
    broker: str,
    *,
    http: str = "",
    key: KeyLike | None = None,
    broker_key: KeyLike | None = None,
) -> Iterator[Finding]:
    """Look at one broker's endpoint, as a trainer that stands here would.

    ``http`` is the broker's HTTP address, for its clock and its readiness. Raises
    :class:`broker.keys.addresses.AddressError` for what is no address.
    """
    address = connecting(broker)
    yield _versions()
    if address.kind == "tcp":
        found, hosts = _name(address)
        yield found
        if not found.good:
            return
        ports = list(_ports(hosts, address.port))
        if not any(port.good for port in ports):
            yield from ports
            return
        # one address of several is enough: peers try them in turn
        yield from (port for port in ports if port.good)
    yield from _conversation(broker, key, broker_key)
    yield _direct(broker)
    if http:
        yield from _http(http)


def _versions() -> Finding:
    installed = {"draftmq": _installed("draftmq"), "protocol": str(VERSION)}
    installed["python"] = platform.python_version()
    installed["libzmq"] = zmq.zmq_version()
    for name in ("torch", "transformers", "vllm"):
        if importlib.util.find_spec(name) is not None:
            installed[name] = _installed(name)
    return Finding("versions", True, ", ".join(f"{k} {v}" for k, v in installed.items()))


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _name(address: Address) -> tuple[Finding, list[str]]:
    """Also the addresses that there are."""
    if not address.named:
        return Finding("name", True, f"{address.host} is an address"), [address.host]
    began = time.monotonic()
    try:
        found = addresses_of(address.host)
    except (OSError, UnicodeError) as error:
        return Finding(
            "name", False, f"{address.host!r} has no address here ({error})",
            "look at this host's DNS or /etc/hosts, or give the broker's IP address",
        ), []  # fmt: skip
    took = time.monotonic() - began
    seen = f"{address.host} is {', '.join(found)} ({took * 1e3:.0f} ms)"
    return Finding("name", True, seen), found


def _ports(hosts: Iterable[str], port: int) -> Iterator[Finding]:
    for host in hosts:
        what, began = f"port {port} of {host}", time.monotonic()
        try:
            socket.create_connection((host, port), _CONNECT_S).close()
        except ConnectionRefusedError:
            yield Finding(
                what, False, "nobody listens",
                "start the broker, and have it listen beyond loopback (--clients, --workers)",
            )  # fmt: skip
        except OSError as error:
            yield Finding(
                what, False, f"no connection ({error})",
                "look at firewalls and routes between this host and the broker",
            )  # fmt: skip
        else:
            yield Finding(what, True, f"connected in {(time.monotonic() - began) * 1e3:.1f} ms")


@dataclass(frozen=True)
class _Sent:
    """The doctor has this sent; ``taken`` is set when the broker has all of it."""

    packets: tuple[Packet, ...]
    taken: threading.Event = field(default_factory=threading.Event)


class _Visit:
    """A peer that says hello and heartbeats, and wants nothing."""

    def __init__(self, endpoint: str, hello: m.Message) -> None:
        link = Link(endpoint, lambda: hello, time.monotonic())
        self.links = {endpoint: link}
        self.link = link
        self.heard: queue.SimpleQueue[m.Message] = queue.SimpleQueue()
        #: heartbeats without an answer; a broker answers each, in the order in which they come
        self._unanswered = 0
        #: the last thing that was to be sent, and the heartbeats that it is behind
        self._sent: tuple[_Sent, int] | None = None

    @property
    def next_timer(self) -> float | None:
        return self.link.next_timer

    def handle(self, event: Any, now: float) -> Iterable[Any]:
        actions: list[Any] = []
        if isinstance(event, Connected):
            actions += self.link.connected(now)
        elif isinstance(event, Disconnected):
            actions += self.link.disconnected(now, event.why)
        elif isinstance(event, Arrived):
            actions += self.link.received(event.packet.message, now)
            self.heard.put(event.packet.message)
            if isinstance(event.packet.message, m.Heartbeat):
                self._answered()
        elif isinstance(event, _Sent):
            packets = (*event.packets, encode(m.Heartbeat(-1)))
            actions += [SendTo(self.link.endpoint, packet) for packet in packets]
            self._sent = event, self._unanswered + 1
        actions += self.link.tick(now)
        said = [action.packet.message for action in actions if isinstance(action, SendTo)]
        self._unanswered += sum(isinstance(message, m.Heartbeat) for message in said)
        return actions

    def _answered(self) -> None:
        self._unanswered -= 1
        if self._sent is not None:
            sent, ahead = self._sent
            self._sent = (sent, ahead - 1) if ahead > 1 else None
            if ahead == 1:
                sent.taken.set()

    def goodbye(self) -> Iterable[Any]:
        return self.link.goodbye("the doctor leaves")


def _conversation(
    broker: str, key: KeyLike | None, broker_key: KeyLike | None
) -> Iterator[Finding]:
    try:
        shown = credentials(Role.TRAINER, [broker], key, broker_key, _logger)
    except DraftmqError as error:
        yield Finding("keys", False, str(error))
        return
    yield Finding("keys", True, f"own key {shown.fingerprint}" if shown.curves else "none are used")
    name = own_name(f"doctor-{socket.gethostname()}-{uuid.uuid4().hex[:8]}", shown.fingerprint)
    incarnation = new_incarnation()
    visit = _Visit(broker, m.ClientHello(name, incarnation, "doctor", -1))
    loop = PeerLoop("draftmq-doctor", visit, lambda _: None, lambda _: None, _logger, shown.curves)
    loop.start()
    try:
        yield from _welcome(visit, broker)
        if visit.link.ready:
            yield _bandwidth(visit, loop, m.RequestId(name, incarnation, 1))
    finally:
        loop.stop()


def _welcome(visit: _Visit, broker: str) -> Iterator[Finding]:
    end = time.monotonic() + _WELCOME_S
    while not visit.link.ready and visit.link.state is not LinkState.REFUSED:
        if time.monotonic() > end:
            yield Finding(
                "broker", False, visit.link.why_not_ready(time.monotonic()),
                "is a draftmq broker there, of this protocol version, and does it want keys?",
            )  # fmt: skip
            return
        time.sleep(0.02)
    if visit.link.refusal is not None:
        yield Finding("broker", False, f"refused: {visit.link.refusal.text}")
        return
    trips = []
    for _ in range(_ROUND_TRIPS):  # heartbeats are answered one by one
        began = time.monotonic()
        while not visit.heard.empty():
            visit.heard.get()
        try:
            visit.heard.get(timeout=2 * visit.link.liveness_s)
        except queue.Empty:
            why = "it welcomed this host, and then said nothing more"
            yield Finding("broker", False, why, "look at the broker's own log, and at the network")
            return
        trips.append(time.monotonic() - began)
        if visit.link.workers >= 0:
            break
    waited = statistics.median(trips)
    seen = f"{visit.link.broker} welcomes this host, and its heartbeats come after {waited:.1f} s"
    yield Finding("broker", True, seen)
    offers = len(visit.link.offers)
    if visit.link.workers > 0 or offers:
        yield Finding("workers", True, f"{visit.link.workers} attached, {offers} offers")
    else:
        yield Finding(
            "workers", False, f"none is attached to {broker}",
            "start a draftmq worker, and look at its log for no_broker",
        )  # fmt: skip


def _bandwidth(visit: _Visit, loop: PeerLoop, request_id: m.RequestId) -> Finding:
    """How fast bytes come to the broker: those of a request that nobody serves, for it is cancelled
    behind them.
    """
    nbytes = min(_SENT_BYTES, visit.link.limits.max_request_bytes)
    tokens = m.TensorSpec("input_ids", "uint8", (nbytes,), 1)
    request = m.Request(
        request_id, "generate", _NO_MODEL, 0, 1, "", "", _SENT_S, (tokens,), offer=_NO_MODEL
    )
    sent = _Sent((encode(request, [bytes(nbytes)]), encode(m.Cancel(request_id))))
    began = time.monotonic()
    loop.post(sent)
    taken = sent.taken.wait(_SENT_S)
    rate = nbytes / (time.monotonic() - began)
    speed = f"{'' if taken else 'less than '}{rate / 1e6:.1f} MB/s"
    return Finding(
        "bandwidth", taken, f"{nbytes / 1e6:.0f} MB to the broker at {speed}",
        "" if taken else "look at the network between here and the broker: lines, cards, tunnels",
    )  # fmt: skip


def _direct(broker: str) -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("direct", True, "no torch is installed here, so nothing goes directly")
    import torch

    from worker.direct.config import DirectConfig, choose

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Finding("direct", True, str(choose(DirectConfig(), device, [broker])))


def _http(http: str) -> Iterator[Finding]:
    opener = build_opener(ProxyHandler({}))
    began = time.time()
    try:
        with opener.open(f"http://{http}/healthz", timeout=_CONNECT_S) as response:
            said = response.headers["Date"]
    except OSError as error:
        yield Finding(
            "http", False, f"nothing healthy answers at http://{http} ({error})",
            "is the broker running with that --http?",
        )  # fmt: skip
        return
    yield Finding("http", True, f"http://{http}/healthz is ok")
    if said:
        off = parsedate_to_datetime(said).timestamp() - (began + time.time()) / 2
        good = abs(off) <= _CLOCK_S
        yield Finding(
            "clock", good, f"the broker's is {off:+.0f} s from this one",
            "" if good else "set them (NTP), or logs of the two cannot be read together",
        )  # fmt: skip


def is_healthy(findings: Iterable[Finding]) -> bool:
    """Whether everything works."""
    return all(finding.good for finding in findings)
