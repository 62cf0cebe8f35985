"""What the holder of a trainer's and a worker's key costs others: a broker process with CURVE, an
honest pair, and beside it one peer with bad manners after the other (:mod:`tests.bench.rude_peer`).

``python -m tests.bench.manners`` prints what SECURITY.md says: the round trip of the honest, the
broker's memory and its log. ``tests/integration/test_manners.py`` holds the bounds.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zmq

from broker.core import Side
from broker.keys.files import Role
from broker.protocol import encode
from broker.protocol import messages as m
from broker.protocol.limits import KIB, MIB
from tests.bench.light import MODEL as HONEST
from tests.bench.light import LightClient, packets, reply_to
from tests.bench.processes import cpu_s, peak_bytes, reset_peak
from tests.bench.rude_peer import SEQUENCES, Rude
from tests.keyring import Keyring

SECONDS = 8.0
#: Limits small enough to be reached, and what docs/memory.md makes of them.
LIMITS = {
    "max_client_bytes": 16 * MIB,
    "max_total_bytes": 64 * MIB,
    "max_client_request_bytes": 16 * MIB,
    "max_total_request_bytes": 64 * MIB,
    "held_answer_bytes": 16 * MIB,
    "held_mapping_bytes": 16 * MIB,
}
_BASE_BYTES, _CONNECTION_BYTES = 64 * MIB, 128 * KIB
_IN_LANE_BYTES = 2 * MIB
_CONNECTIONS = 1024
FORMULA_BYTES = (
    _BASE_BYTES
    + _CONNECTIONS * _CONNECTION_BYTES
    + _IN_LANE_BYTES
    + sum(LIMITS[name] for name in LIMITS if "client" not in name)
)
_BEAT_S = 0.5
_GAP_S = 0.005
_PATIENCE_S = 30.0
_BROKER = """
import json, sys
from broker.core import BrokerConfig
from broker.logs import configure
from broker.service import Broker
configure("json")
key, allow, limits = sys.argv[1:]
with Broker(config=BrokerConfig(**json.loads(limits)), key=key, allow=[allow]) as broker:
    print(json.dumps([broker.client_endpoint, broker.worker_endpoint]), flush=True)
    broker.wait()
"""


@dataclass
class Figures:
    """Beside one kind of bad manners. ``said`` is how often the rude said it."""

    said: int
    replies: int
    p50_s: float
    p99_s: float
    longest_s: float
    peak_bytes: int
    log_bytes: int
    cpu_s: float


class Cluster:
    """The broker, and an honest pair that asks on and on, all in this thread but the broker."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="draftmq-")))
        keys = Keyring(self.path)
        for role in (Role.TRAINER, Role.WORKER):
            for name in ("honest", "rude"):
                keys.make(f"{name}-{role.value}", role)
        self.log = self.path / "broker.log"
        command = [sys.executable, "-c", _BROKER, keys.broker, keys.allow, json.dumps(LIMITS)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command], stdout=subprocess.PIPE, stderr=log
            )
        stack.callback(self.process.wait)
        stack.callback(self.process.terminate)
        assert self.process.stdout is not None
        self.clients, self.workers = json.loads(self.process.stdout.readline())
        context = stack.enter_context(zmq.Context())
        context.linger = 0
        pair = Pair(context, Rude(self.clients, self.workers, self.path, "honest"))
        self.pair = stack.enter_context(contextlib.closing(pair))

    def beside(self, sequence: str, seconds: float) -> Figures:
        """What the honest saw while a rude peer said this."""
        reset_peak(self.process.pid)
        logged, cpu_began_s = self.log.stat().st_size, cpu_s(self.process.pid)
        command = ["tests.bench.rude_peer", sequence, self.clients, self.workers, self.path]
        rude = subprocess.Popen(
            [sys.executable, "-m", *map(str, command), str(seconds)], stdout=subprocess.PIPE
        )
        took_s = self.pair.work(lambda: rude.poll() is not None)
        assert rude.stdout is not None
        with rude:
            said = rude.stdout.read()
        if self.process.poll() is not None or not said:
            raise RuntimeError(f"{sequence}: {self.log.read_text()[-2000:]}")
        return Figures(
            said=int(said),
            replies=len(took_s),
            p50_s=statistics.median(took_s),
            p99_s=statistics.quantiles(took_s, n=100)[98],
            longest_s=max(took_s),
            peak_bytes=peak_bytes(self.process.pid),
            log_bytes=self.log.stat().st_size - logged,
            cpu_s=cpu_s(self.process.pid) - cpu_began_s,
        )


class Pair:
    """A client that asks for 1 KiB, and again when it has it, and the worker that answers."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], place: Rude) -> None:
        self._worker = place.connect(Side.WORKER, context)
        name = place.name(Side.WORKER, "honest")
        hello = m.WorkerHello(name, time.time_ns(), HONEST, 2, ())
        self._worker.send_multipart(encode(hello).frames)
        name = place.name(Side.CLIENT, "honest")
        self._client = LightClient(context, place.connect(Side.CLIENT, context), name)
        self._poller = zmq.Poller()
        for sock in (self._worker, self._client.socket):
            self._poller.register(sock, zmq.POLLIN)

    def work(self, done: Callable[[], bool]) -> list[float]:
        """Seconds that each reply took, until it is ``done``."""
        took_s: list[float] = []
        asked_at = beats_at = 0.0
        while asked_at or not done():
            now = time.monotonic()
            if not asked_at:
                asked_at = now
                self._client.ask()
            if now >= beats_at:
                self._client.beat()
                self._worker.send_multipart(encode(m.Heartbeat(-1)).frames)
                beats_at = now + _BEAT_S
            self._poller.poll(1000 * _BEAT_S)
            for packet in packets(self._worker):
                if isinstance(packet.message, m.Request):
                    self._worker.send_multipart(reply_to(packet).frames, copy=False)
            if (reply := self._client.take()) is not None:
                took_s.append(time.monotonic() - asked_at)
                self._client.acknowledge(reply)
                asked_at = 0.0
                time.sleep(_GAP_S)
            elif asked_at and now - asked_at > _PATIENCE_S:
                raise TimeoutError(f"the honest have waited for {now - asked_at:.0f} s")
        return took_s

    def close(self) -> None:
        for sock in (self._worker, self._client.socket):
            sock.close()


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        yield Cluster(stack)


def main() -> None:
    """Print a row for each kind, in the words of SECURITY.md."""
    print("| bad manners | said | p50 | p99 | broker's CPU | memory | log |")
    print("|---|---|---|---|---|---|---|")
    with cluster() as there:
        for sequence, says in SEQUENCES.items():
            seen = there.beside(sequence, SECONDS)
            what = (says.__doc__ or "").strip().rstrip(".").lower()
            print(
                f"| {what} | {seen.said} | {1000 * seen.p50_s:.1f} ms | {1000 * seen.p99_s:.0f} ms "
                f"| {seen.cpu_s / SECONDS:.0%} | {seen.peak_bytes / MIB:.0f} MiB "
                f"| {seen.log_bytes / KIB:.0f} KiB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
