"""Strangers on the broker's ports: they are got rid of, and the others are served."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from broker.core import BrokerConfig, Side
from broker.keys.files import Role
from broker.logs import Throttle
from broker.peer.credentials import credentials
from broker.protocol import decode, encode
from broker.protocol import messages as m
from broker.protocol.names import own_name
from broker.service import Broker
from broker.transport import sockets
from broker.transport.connections import Allowance, Connections, cut, port_of
from broker.transport.dealer import Dealer
from broker.watch.http import HttpServer, text
from tests.broker.core.rig import model
from tests.keyring import Keyring
from tests.waiting import eventually
from tests.zmtp import connect, frame, greeting, null_handshake, read_message

CONFIG = BrokerConfig(hello_s=0.5, max_strangers=64, liveness_s=60)


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path)


@pytest.fixture(params=["clear", "keys"])
def broker(
    request: pytest.FixtureRequest, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Broker]:
    monkeypatch.setattr(sockets, "_HANDSHAKE_MS", 500)
    keyring.make("t", Role.TRAINER)
    keys = {"key": keyring.broker, "allow": [keyring.allow]} if request.param == "keys" else {}
    with Broker(config=CONFIG, **keys) as service:
        yield service


class Healthy:
    """An honest trainer that wants an answer at any time."""

    def __init__(self, endpoint: str, secret: Path | None, public: Path) -> None:
        keys = (secret, public) if secret else (None, None)
        shown = credentials(Role.TRAINER, [endpoint], *keys, logging.getLogger("test"))
        self._context = zmq.Context()
        self._dealer = Dealer(self._context, endpoint, shown.curves.get(endpoint))
        self._say(m.ClientHello(own_name("healthy", shown.fingerprint), 1, "", 0), m.Welcome)

    def ping(self) -> float:
        """Seconds until the broker answers."""
        began = time.monotonic()
        self._say(m.Heartbeat(-1), m.Heartbeat)
        return time.monotonic() - began

    def _say(self, message: m.Message, expected: type) -> None:
        self._dealer.send(encode(message).frames)
        answer: m.Message = m.HelloWanted("")
        while isinstance(answer, m.HelloWanted):  # the answer to a message that nobody could read
            assert self._dealer.socket.poll(20_000), "the broker serves nobody"
            frames = self._dealer.receive()
            assert frames is not None
            answer = decode(frames).message
        assert isinstance(answer, expected)

    def close(self) -> None:
        self._dealer.close()
        self._context.term()


@pytest.fixture
def healthy(broker: Broker, keyring: Keyring) -> Iterator[Healthy]:
    secret = keyring.allow.parent / "t.secret" if broker._access.keyed else None
    peer = Healthy(broker.client_endpoint, secret, keyring.broker_public)
    yield peer
    peer.close()


def hung_up(sock: socket.socket) -> bool:
    """Wait until the other side closes; True when it did within the socket's timeout."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def connections(broker: Broker) -> int:
    return sum(len(port.connections) for port in broker._ports.values())


def send_until_cut(sock: socket.socket, octets: bytes, limit_bytes: int) -> int:
    """How much was sent before the other side hung up; fails at ``limit_bytes``."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while True:
            sent += sock.send(octets)
            assert sent < limit_bytes, "the broker takes anything"
    return sent


def cut_for(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Why connections were cut off."""
    cuts = [record for record in caplog.records if record.message == "cut_off"]
    return [record.fields["why"] for record in cuts]  # type: ignore[attr-defined]


# -- one stranger -------------------------------------------------------------------------------

FIRST_WORDS = {
    "nothing": b"",
    "noise": bytes(range(1, 256)) * 16,
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "half a greeting": greeting()[:11],
    "a greeting and no more": greeting(),
    "a CURVE greeting and no more": greeting(b"CURVE"),
    "another mechanism": greeting(b"PLAIN"),
    "a CURVE hello of zeros": greeting(b"CURVE") + b"\x04\xc8\x05HELLO" + bytes(194),
    "a handshake command of 8 GB": greeting(b"CURVE") + b"\x06" + struct.pack(">Q", 8 << 30),
    "a handshake command of 60 MB": greeting(b"CURVE") + b"\x06" + struct.pack(">Q", 60 << 20),
}


@pytest.mark.parametrize("port", ["client_endpoint", "worker_endpoint"])
@pytest.mark.parametrize("words", FIRST_WORDS)
def test_a_connection_that_goes_nowhere_is_closed(
    broker: Broker, healthy: Healthy, port: str, words: str
) -> None:
    with connect(getattr(broker, port)) as sock:
        sock.sendall(FIRST_WORDS[words])
        assert healthy.ping() < 5
        assert hung_up(sock)
    healthy.ping()
    eventually(lambda: connections(broker) == 1)


def test_one_byte_at_a_time_gains_nothing(broker: Broker, healthy: Healthy) -> None:
    with connect(broker.client_endpoint) as sock:
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < began + 10:
                sock.sendall(b"\xff")
                time.sleep(0.02)
        assert time.monotonic() < began + 5
    healthy.ping()


@pytest.mark.parametrize("broker", ["clear"], indirect=True)
def test_a_handshake_without_a_hello_has_its_time(broker: Broker, healthy: Healthy) -> None:
    with connect(broker.client_endpoint) as sock:
        null_handshake(sock)
        began = time.monotonic()
        assert hung_up(sock)
        assert time.monotonic() - began < 5
    healthy.ping()
    assert not broker.core.clients.keys() - {"healthy"}


@pytest.mark.parametrize("broker", ["clear"], indirect=True)
def test_a_message_that_never_ends_cannot_fill_the_memory(
    broker: Broker, healthy: Healthy, caplog: pytest.LogCaptureFixture
) -> None:
    octets = frame(bytes(1 << 16), more=True) * 4
    before = _rss_bytes()
    with connect(broker.client_endpoint) as sock:
        null_handshake(sock)
        sent = send_until_cut(sock, octets, 8 << 30)
    assert sent > 100_000  # less would be a hello's right
    assert _rss_bytes() - before < 1 << 30
    healthy.ping()  # the loop has also said what it did
    assert "over 1114112 bytes and no hello" in cut_for(caplog)


@pytest.mark.parametrize("broker", ["clear"], indirect=True)
def test_a_stranger_that_talks_and_never_listens_is_cut_off(
    broker: Broker, healthy: Healthy, caplog: pytest.LogCaptureFixture
) -> None:
    heartbeat = frame(encode(m.Heartbeat(-1)).frames[0])
    with connect(broker.client_endpoint) as sock:
        null_handshake(sock)
        send_until_cut(sock, heartbeat * 100, 1 << 30)
    healthy.ping()
    assert "many messages and no hello" in cut_for(caplog)


@pytest.mark.parametrize("broker", ["clear"], indirect=True)
def test_garbage_does_not_fill_the_log(
    broker: Broker, healthy: Healthy, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(20):
        with connect(broker.client_endpoint) as sock:
            null_handshake(sock)
            before = broker.core.counters["bad_messages"]
            sock.sendall(frame(b"garbage") * 60)
            eventually(lambda before=before: broker.core.counters["bad_messages"] >= before + 60)
    healthy.ping()
    assert broker.core.counters["bad_messages"] >= 1200
    assert 20 <= caplog.messages.count("bad_message") <= 60


def test_a_header_that_is_too_long_is_a_bad_message(broker: Broker, healthy: Healthy) -> None:
    healthy._dealer.send([bytes((1 << 20) + 1)])
    eventually(lambda: broker.core.counters["bad_messages"] == 1)
    healthy.ping()


# -- peers with a session -----------------------------------------------------------------------


@contextlib.contextmanager
def session(endpoint: str, name: str = "peer") -> Iterator[socket.socket]:
    """A client whose hello was accepted, on a socket of its own."""
    with connect(endpoint) as sock:
        null_handshake(sock)
        sock.sendall(frame(encode(m.ClientHello(name, 1, "", 0)).frames[0]))
        assert isinstance(decode(read_message(sock)).message, m.Welcome)
        yield sock


@pytest.mark.parametrize("broker", ["clear"], indirect=True)
def test_a_peers_message_without_end_is_cut_off(
    broker: Broker, healthy: Healthy, caplog: pytest.LogCaptureFixture
) -> None:
    with session(broker.client_endpoint) as sock:
        began = time.monotonic()
        send_until_cut(sock, frame(bytes(1 << 16), more=True) * 4, 4 << 30)
        assert time.monotonic() - began < CONFIG.liveness_s / 2  # and not for its silence
    healthy.ping()
    assert [why for why in cut_for(caplog) if why.endswith("bytes and no end of the message")]


def test_a_message_of_very_many_frames_costs_its_connection(
    broker: Broker, healthy: Healthy, caplog: pytest.LogCaptureFixture
) -> None:
    """65 KB as 20,000 frames are a hello's right by their bytes."""
    (sender,) = broker._ports[Side.CLIENT].connections
    healthy._dealer.send([b"x"] * 20_000)
    eventually(lambda: "a message of more than 8193 frames" in cut_for(caplog))
    eventually(lambda: all(each is not sender for each in broker._ports[Side.CLIENT].connections))


@pytest.mark.parametrize("broker", ["clear"], indirect=True)
def test_a_peer_that_only_says_that_it_has_its_replies_is_cut_off(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    """With small replies in place of large ones, and as much less room for them."""
    config = BrokerConfig(liveness_s=60, max_client_bytes=8 << 20)
    payload = [bytes(1 << 20)] * 8
    manifest = (m.TensorSpec("x", "uint8", (8 << 20,), 8),)
    with (
        Broker(config=config) as small,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as worker,
        session(small.client_endpoint) as sock,
    ):
        worker.linger = 0
        worker.connect(small.worker_endpoint)
        worker.send(encode(m.WorkerHello("w", 1, model(), 1, ())).frames[0])
        worker.recv()
        with contextlib.suppress(ConnectionError):
            for number in range(20):
                request_id = m.RequestId("peer", 1, number)
                asked = m.Request(request_id, "generate", "", 0, 1, "", "probs", 60.0, ())
                sock.sendall(frame(encode(asked).frames[0]))
                assert worker.poll(20_000)
                worker.recv()
                fields = (request_id, "w", "tiny", "f0", (1, 3, 4), 0, "", "probs", 0.1, "")
                reply = encode(m.Reply(*fields, manifest), payload)
                worker.send_multipart(reply.frames)
                peer = small.core.clients["peer"]
                eventually(lambda peer=peer, number=number: peer.answered > number)
                sock.sendall(frame(encode(m.Received((request_id,))).frames[0]))
        eventually(lambda: [why for why in cut_for(caplog) if why.endswith("does not take")])


# -- many strangers -----------------------------------------------------------------------------


def test_2000_connections_do_not_shut_out_an_honest_one(
    broker: Broker, keyring: Keyring, healthy: Healthy
) -> None:
    before = _rss_bytes()
    with contextlib.ExitStack() as stack:
        for number in range(2000):
            stack.enter_context(connect(broker.client_endpoint)).sendall(greeting())
            if number % 100 == 0:
                assert healthy.ping() < 5
        secret = keyring.allow.parent / "t.secret" if broker._access.keyed else None
        late = Healthy(broker.client_endpoint, secret, keyring.broker_public)
        assert late.ping() < 5
        late.close()
        assert connections(broker) <= CONFIG.max_strangers + 2
    assert _rss_bytes() - before < 200 << 20
    eventually(lambda: connections(broker) <= 2)


@pytest.mark.parametrize("keyed", [False, True], ids=["clear", "keys"])
def test_a_broker_without_descriptors_goes_on(keyring: Keyring, keyed: bool) -> None:
    """A real process with 256 of them, and 1,000 connections."""
    secret = keyring.make("t", Role.TRAINER) if keyed else None
    options = ["--key", str(keyring.broker), "--allow", str(keyring.allow)] if keyed else []
    command = [sys.executable, "-m", "broker", "--clients=tcp://127.0.0.1:0", "--log-format=json"]
    command += ["--workers=tcp://127.0.0.1:0", "--http=127.0.0.1:0", "--liveness-s=60"]
    command += options
    child = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)),
    )
    assert child.stderr is not None
    try:
        listening = json.loads(child.stderr.readline())
        healthy = Healthy(listening["clients"], secret, keyring.broker_public)
        with contextlib.ExitStack() as stack:
            for number in range(1000):
                stack.enter_context(connect(listening["workers"]))
                if number % 100 == 0:
                    assert healthy.ping() < 10
            assert healthy.ping() < 10
            began = time.monotonic()
            late = Healthy(listening["clients"], secret, keyring.broker_public)
            assert time.monotonic() - began < 5  # and not when the others' time is over
            late.close()
        healthy.close()
    finally:
        child.send_signal(signal.SIGTERM)
        log = child.communicate(timeout=20)[1]
    assert child.returncode == 0, log
    assert len(log.splitlines()) < 200


def test_http_answers_also_where_descriptors_are_high() -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(1100):
            stack.callback(os.close, os.dup(0))
        server = HttpServer("127.0.0.1:0", {"/healthz": lambda environ: text("ok")})
        server.start()
        stack.callback(server.stop)
        with urllib.request.urlopen(f"http://{server.address}/healthz", timeout=10) as response:
            assert response.read() == b"ok\n"


def test_sighup_rereads_the_allow_list_of_a_real_process(keyring: Keyring) -> None:
    keyring.make("a", Role.TRAINER)
    command = [sys.executable, "-m", "broker", "--clients=tcp://127.0.0.1:0", "--log-format=json"]
    command += ["--workers=tcp://127.0.0.1:0", "--http=off"]
    command += [f"--key={keyring.broker}", f"--allow={keyring.allow}"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    try:
        assert json.loads(child.stderr.readline())["event"] == "listening"
        child.send_signal(signal.SIGHUP)
        read = json.loads(child.stderr.readline())
        assert (read["event"], read["keys"]) == ("allow_list_read", 1)
    finally:
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=20)
    assert child.returncode == 0


# -- the parts ----------------------------------------------------------------------------------


def test_the_oldest_strangers_go_and_those_with_a_hello_stay() -> None:
    known = {b"a"}
    there = Connections(known, Allowance(hello_s=10, max_strangers=2, strange_bytes=100))
    for descriptor in range(1001, 1005):
        there.accepted(descriptor, now=descriptor)
    there.spoke(1001, b"a", "", now=0.0)
    assert [c.descriptor for c in there.surplus(100)] == [1002]
    there.closed(1002)
    assert [c.descriptor for c in there.surplus(2)] == [1003]
    assert [c.descriptor for c in there.surplus(0)] == [1003, 1004]
    assert [(c.descriptor, why) for c, why in there.overdue(1013)] == [
        (1003, "no hello within 10 s")
    ]
    known.clear()  # its session ended: a stranger again, from now on
    assert 1001 not in [c.descriptor for c, _ in there.overdue(1014)]
    assert 1001 in [c.descriptor for c, _ in there.overdue(1024)]


def test_only_connections_to_our_own_port_are_cut() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = port_of(listener.getsockname())
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with client, accepted:
            assert cut(accepted.fileno(), 1) == ""
            assert cut(listener.fileno(), ours) == ""
            assert cut(client.fileno(), ours) == ""
            assert cut(2**20, ours) == ""
            reader, writer = os.pipe()
            assert cut(reader, ours) == ""
            os.close(reader)
            os.close(writer)
            client.sendall(b"x")
            assert accepted.recv(1) == b"x"
            assert cut(accepted.fileno(), ours).startswith("127.0.0.1:")
            assert client.recv(1) == b""


def test_a_flood_of_events_is_counted_and_not_written() -> None:
    throttle = Throttle(burst=3, per_s=1.0)
    assert [throttle.left_out("a", 0.0) for _ in range(5)] == [0, 0, 0, None, None]
    assert throttle.left_out("b", 0.0) == 0
    assert throttle.left_out("a", 1.0) == 2
    assert throttle.left_out("a", 1.5) is None


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
