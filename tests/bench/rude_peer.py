"""``python -m tests.bench.rude_peer SEQUENCE CLIENTS WORKERS KEYS SECONDS``: bad manners.

A peer with a trainer's and a worker's key that says the same thing on and on, as fast as the broker
takes it. Its model is its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import zmq

from broker.core import Side
from broker.keys.files import Role, SecretKey, read_public, read_secret
from broker.protocol import decode, encode
from broker.protocol import messages as m
from broker.protocol.limits import KIB, MIB, Limits
from broker.protocol.names import own_name
from broker.transport.sockets import Curve, configure
from tests.broker.core.rig import mapping_offer, model
from tests.fuzz.frames import seal

_MODEL = model("rude")
#: Messages that wait in a socket here before this process does.
_QUEUE = 1000
_ROLES = {Side.CLIENT: Role.TRAINER, Side.WORKER: Role.WORKER}


class Rude:
    """Where the broker is, and the keys to it of whoever is called ``who``."""

    def __init__(self, clients: str, workers: str, keys: Path, who: str = "rude") -> None:
        self.context = zmq.Context()
        self._who = who
        self._endpoints = {Side.CLIENT: clients, Side.WORKER: workers}
        self._keys = keys
        self._server = read_public(keys / "broker.public").key

    def name(self, side: Side, name: object) -> str:
        """As the holder of the side's key may call itself."""
        return own_name(str(name), self._secret(side).public.fingerprint)

    def connect(
        self, side: Side, context: zmq.Context[zmq.Socket[bytes]] | None = None
    ) -> zmq.Socket[bytes]:
        secret = self._secret(side)
        sock = (context or self.context).socket(zmq.DEALER)
        curve = Curve(secret.public.key, secret.key, self._server)
        configure(sock, Limits(), curve)
        sock.sndhwm = _QUEUE
        sock.sndtimeo = 2000
        sock.connect(self._endpoints[side])
        return sock

    def _secret(self, side: Side) -> SecretKey:
        role = _ROLES[side]
        return read_secret(self._keys / f"{self._who}-{role.value}.secret", role)


def client_hello(rude: Rude, name: object, job: str = "rude", life: int = 1) -> m.ClientHello:
    return m.ClientHello(rude.name(Side.CLIENT, name), life, job, 0)


def worker_hello(
    rude: Rude,
    name: object,
    held: tuple[m.RequestId, ...] = (),
    serves: m.ModelDescription = _MODEL,
    life: int = 1,
) -> m.WorkerHello:
    return m.WorkerHello(rude.name(Side.WORKER, name), life, serves, 64, held)


def say(sock: zmq.Socket[bytes], message: m.Message, payload: tuple[bytes, ...] = ()) -> None:
    sock.send_multipart(encode(message, payload).frames, copy=False)


def say_unchecked(sock: zmq.Socket[bytes], message: m.Message, **changes: object) -> None:
    """With values that no peer of ours would send."""
    values = [_plain(changes.get(n, getattr(message, n))) for n in message.__slots__]
    sock.send_multipart(seal(message.KIND, msgpack.packb(values), []))


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return [_plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def heard(sock: zmq.Socket[bytes]) -> Iterator[m.Message]:
    while sock.poll(0):
        yield decode(sock.recv_multipart()).message


# -- what it says, over and over ----------------------------------------------------------------


def names(rude: Rude) -> Iterator[None]:
    """Two names on one connection, and a cut."""
    for number in itertools.count():
        for side, hello in ((Side.CLIENT, client_hello), (Side.WORKER, worker_hello)):
            with rude.connect(side) as sock:
                for name in (2 * number, 2 * number + 1):
                    say(sock, hello(rude, name))
                sock.poll(1000)
        yield


def long_texts(rude: Rude) -> Iterator[None]:
    """256 KiB where the broker would put them into a message of its own."""
    long = "x" * (256 * KIB - 1)
    asker, server = rude.connect(Side.CLIENT), rude.connect(Side.WORKER)
    asked = m.RequestId(rude.name(Side.CLIENT, "a"), 1, 1)
    while True:
        say(asker, client_hello(rude, "a"))
        say(server, worker_hello(rude, "w"))
        say_unchecked(server, m.Failure(asked, "target_failed", ""), text=long)
        say_unchecked(server, m.Failure(asked, "x", ""), code=long)
        say_unchecked(server, worker_hello(rude, "w"), worker=long)
        for field in ("model", "fingerprint"):
            serves = dataclasses.replace(_MODEL, **{field: long})
            say_unchecked(server, worker_hello(rude, "w"), model=serves)
        say_unchecked(asker, client_hello(rude, "a"), client=long)
        say_unchecked(asker, client_hello(rude, "a"), job=long)
        say_unchecked(asker, mapping_offer(1).message, mapping_id=long)
        say_unchecked(asker, mapping_offer(1).message, vocab_size=-1)
        for sock in (asker, server):
            say_unchecked(sock, m.Goodbye(""), reason=long)
        yield


def compute_times(rude: Rude) -> Iterator[None]:
    """Answers that took no time, or for ever."""
    for asked in _asked_and_given(rude, b"t" * 8):
        sock, request = asked
        for compute_s in (5e-324, 1.7e308, 1e9):
            say_unchecked(sock, _reply(request), compute_s=compute_s)
        yield


def held(rude: Rude) -> Iterator[None]:
    """Claims on 4,000 requests of others, that are there and that are to come."""
    claims = tuple(m.RequestId("honest", 1, number) for number in range(4000))
    sock = rude.connect(Side.WORKER)
    for life in itertools.count(1):
        say(sock, worker_hello(rude, "w", claims, life=life))
        yield


def payloads(rude: Rude) -> Iterator[None]:
    """Requests of a megabyte that are answered at once, and leave a timer each."""
    for sock, request in _asked_and_given(rude, b"t" * MIB):
        say(sock, _reply(request))
        yield


def running(rude: Rude) -> Iterator[None]:
    """Requests of a megabyte from ever new clients that are never answered."""
    server = rude.connect(Side.WORKER)
    say(server, worker_hello(rude, "w"))
    for number in range(1 << 30):
        asker = rude.connect(Side.CLIENT)
        say(asker, client_hello(rude, number % 50, life=number + 1))
        for each in range(16):
            say(asker, _request(rude, number % 50, number + 1, each, MIB), (b"t" * MIB,))
        say(server, m.Heartbeat(-1))
        yield


def jobs(rude: Rude) -> Iterator[None]:
    """A new job with each life."""
    sock = rude.connect(Side.CLIENT)
    for life in itertools.count(1):
        say(sock, client_hello(rude, "a", f"job {life}" + "x" * 200, life))
        say(sock, _request(rude, "a", life, 1), (b"t",))
        yield


def steps(rude: Rude) -> Iterator[None]:
    """A new step with each request, given up at once."""
    sock = rude.connect(Side.CLIENT)
    say(sock, client_hello(rude, "a"))
    for number in itertools.count():
        request = _request(rude, "a", 1, number)
        say(sock, dataclasses.replace(request, step=number), (b"t",))
        say(sock, m.Cancel(request.id))
        yield


def models(rude: Rude) -> Iterator[None]:
    """A new model with each life."""
    sock = rude.connect(Side.WORKER)
    for life in itertools.count(1):
        say(sock, worker_hello(rude, "w", serves=model(f"model {life}"), life=life))
        yield


def mappings(rude: Rude) -> Iterator[None]:
    """Ever new vocab mappings of 8 KiB."""
    sock = rude.connect(Side.CLIENT)
    say(sock, client_hello(rude, "a"))
    for number in itertools.count():
        offer = mapping_offer(*range(number, number + 1024), vocab_size=1 << 31)
        sock.send_multipart(offer.frames)
        yield


def connections(rude: Rude) -> Iterator[None]:
    """250 clients that come, and are cut."""
    for number in itertools.count():
        socks = [rude.connect(Side.CLIENT) for _ in range(250)]
        for each, sock in enumerate(socks):
            say(sock, client_hello(rude, f"{number} {each}"))
        for sock in socks:
            sock.poll(2000)
            sock.close()
        yield


def _asked_and_given(rude: Rude, payload: bytes) -> Iterator[tuple[zmq.Socket[bytes], m.Request]]:
    """Requests of its own, each as its own worker is given it."""
    asker, server = rude.connect(Side.CLIENT), rude.connect(Side.WORKER)
    say(asker, client_hello(rude, "a"))
    say(server, worker_hello(rude, "w"))
    for number in itertools.count():
        say(asker, _request(rude, "a", 1, number, len(payload)), (payload,))
        for sock in (asker, server):
            say(sock, m.Heartbeat(-1))
        server.poll(100)
        for message in heard(server):
            if isinstance(message, m.Request):
                yield server, message
        for message in heard(asker):
            if isinstance(message, m.Reply):
                say(asker, m.Received((message.id,)))


def _request(rude: Rude, name: object, life: int, number: int, nbytes: int = 1) -> m.Request:
    asked = m.RequestId(rude.name(Side.CLIENT, name), life, number)
    spec = m.TensorSpec("input_ids", "uint8", (nbytes,), 1)
    return m.Request(
        asked, "generate", "rude", number, nbytes, "", "probs", 1e9, (spec,), offer=_MODEL.offer
    )


def _reply(request: m.Request) -> m.Reply:
    return m.Reply(
        request.id, "w", "rude", "f0", (1,), 0, "", "probs", 0.0, "", (), offer=_MODEL.offer
    )


SEQUENCES: dict[str, Callable[[Rude], Iterator[None]]] = {
    each.__name__: each
    for each in (
        names,
        long_texts,
        compute_times,
        held,
        payloads,
        running,
        jobs,
        steps,
        models,
        mappings,
        connections,
    )
}


def main(sequence: str, clients: str, workers: str, keys: str, seconds: str) -> None:
    """Say it for so long; prints how often."""
    rude = Rude(clients, workers, Path(keys))
    ends_at = time.monotonic() + float(seconds)
    for said, _ in enumerate(SEQUENCES[sequence](rude), 1):
        if time.monotonic() >= ends_at:
            print(said, flush=True)
            break
    rude.context.destroy(linger=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
