"""What is done to a cluster, by name. Each fault undoes itself after a while."""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
import time
from collections.abc import Callable
from random import Random

import zmq

from broker.chaos.addresses import parse_endpoint
from broker.chaos.faults import read_fault
from broker.protocol import encode
from broker.protocol import messages as m
from tests.chaos.cluster import CLIENTS, Cluster, Process

#: Does it, or returns False where it cannot be done now.
Do = Callable[[Cluster, Random], bool]

#: name -> (how often, relative to the others; what it does)
PROCESS_FAULTS: dict[str, tuple[float, Do]] = {}
_NETWORK: dict[str, Callable[[Random], dict[str, object]]] = {
    "cut": lambda luck: {"connections": "one", "how": luck.choice(("rst", "fin"))},
    "half-close": lambda luck: {"connections": "one", "direction": luck.choice(("up", "down"))},
    "truncate": lambda luck: {"connections": "one", "how": luck.choice(("rst", "fin"))},
    "corrupt": lambda luck: {"connections": "one", "bits": luck.choice((1, 1, 8, 64))},
    "stall": lambda luck: {"connections": "one", "for": luck.choice((0.3, 1.0, 6.0))},
    "blackhole": lambda luck: {"connections": "one", "for": luck.uniform(0.2, 2)},
    "refuse": lambda luck: {"for": luck.uniform(0.2, 1.5)},
    "delay": lambda luck: {"delay_s": 0.02, "jitter_s": 0.02, "for": luck.uniform(0.5, 2)},
    "throttle": lambda luck: {"bytes_per_s": 3e6, "for": luck.uniform(0.5, 2)},
}


def network_fault(cluster: Cluster, luck: Random) -> str:
    """Inject one of the proxy's faults, between the broker and its clients or its workers."""
    kind = luck.choice(list(_NETWORK))
    said = {"kind": kind, "pair": luck.choice((1, 2)), **_NETWORK[kind](luck)}
    cluster.proxy.inject(read_fault(said))
    if kind == "refuse":  # it strikes who connects
        cluster.proxy.inject(read_fault({"kind": "cut", "pair": said["pair"]}))
    return kind


def process_fault(cluster: Cluster, luck: Random, *, gentle: bool) -> str:
    """Strike a process; nothing that ends a broker or worker when ``gentle``. Its name, or ""."""
    names = [n for n in PROCESS_FAULTS if not gentle or n in _GENTLE]
    name = luck.choices(names, [PROCESS_FAULTS[n][0] for n in names])[0]
    return name if PROCESS_FAULTS[name][1](cluster, luck) else ""


_GENTLE = ("stop worker", "stop broker", "stop trainer", "slow consumer", "churn")


def _fault(name: str, weight: float) -> Callable[[Do], Do]:
    def register(do: Do) -> Do:
        PROCESS_FAULTS[name] = weight, do
        return do

    return register


def _free(cluster: Cluster, process: Process | None, seconds: float) -> bool:
    """Claim a process for a fault of this length; False while another has it."""
    if process is None or not process.alive or process.name in cluster.claimed:
        return False
    cluster.claimed.add(process.name)
    cluster.later(seconds, lambda: cluster.claimed.discard(process.name))
    return True


def _end(cluster: Cluster, process: Process | None, number: signal.Signals) -> bool:
    """End a process for good; :meth:`Cluster.turn` or the run starts it again."""
    if process is None or not _free(cluster, process, 8.0):
        return False
    process.may_end |= {-number}
    process.signal(number)
    return True


def _stop(cluster: Cluster, process: Process | None, seconds: float) -> bool:
    if process is None or not _free(cluster, process, seconds + 1):
        return False
    process.signal(signal.SIGSTOP)
    cluster.later(seconds, lambda: process.signal(signal.SIGCONT))
    return True


def _limit(process: Process, kind: int, limit: int) -> Callable[[], None]:
    """Set a soft resource limit of a process; what lifts it again."""
    pid = process.child.pid
    before = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (limit, before[1]))

    def lift() -> None:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, kind, before)

    return lift


def _worker(cluster: Cluster, luck: Random) -> Process | None:
    """One of the workers, unless one of them is away already."""
    if any(name in cluster.claimed for name in cluster.workers):
        return None
    return luck.choice(list(cluster.workers.values()))


@_fault("kill worker", 2)
def _kill_worker(cluster: Cluster, luck: Random) -> bool:
    return _end(cluster, _worker(cluster, luck), signal.SIGKILL)


@_fault("terminate worker", 2)
def _terminate_worker(cluster: Cluster, luck: Random) -> bool:
    return _end(cluster, _worker(cluster, luck), signal.SIGTERM)


@_fault("stop worker", 3)
def _stop_worker(cluster: Cluster, luck: Random) -> bool:
    return _stop(cluster, _worker(cluster, luck), luck.choice((0.5, 2.0, 7.0)))


@_fault("churn", 1)
def _churn(cluster: Cluster, luck: Random) -> bool:
    """One worker more for a while."""
    if "extra" in cluster.workers:
        return False
    cluster.start_worker("extra")
    cluster.later(12.0, lambda: cluster.dismiss("extra"))
    return True


@_fault("kill broker", 2)
def _kill_broker(cluster: Cluster, luck: Random) -> bool:
    return _end(cluster, cluster.broker, signal.SIGKILL)


@_fault("terminate broker", 2)
def _terminate_broker(cluster: Cluster, luck: Random) -> bool:
    return _end(cluster, cluster.broker, signal.SIGTERM)


@_fault("stop broker", 2)
def _stop_broker(cluster: Cluster, luck: Random) -> bool:
    return _stop(cluster, cluster.broker, luck.choice((0.5, 2.0, 6.0)))


@_fault("kill trainer", 1)
def _kill_trainer(cluster: Cluster, luck: Random) -> bool:
    return _end(cluster, cluster.trainer, signal.SIGKILL)


@_fault("terminate trainer", 1)
def _terminate_trainer(cluster: Cluster, luck: Random) -> bool:
    return _end(cluster, cluster.trainer, signal.SIGTERM)


@_fault("stop trainer", 2)
def _stop_trainer(cluster: Cluster, luck: Random) -> bool:
    return _stop(cluster, cluster.trainer, luck.choice((0.5, 2.0, 6.0)))


@_fault("disk full", 1)
def _disk_full(cluster: Cluster, luck: Random) -> bool:
    """No file of the trainer may grow beyond 1 MiB: metrics fit, a checkpoint does not."""
    trainer = cluster.trainer
    if trainer is None or not cluster.stepping or not _free(cluster, trainer, 8.0):
        return False
    _limit(trainer, resource.RLIMIT_FSIZE, 1 << 20)
    trainer.may_end |= {1}
    trainer.wants = "cannot write the checkpoint"
    return True


@_fault("no file descriptors", 2)
def _no_file_descriptors(cluster: Cluster, luck: Random) -> bool:
    """A crowd takes the broker's last file descriptors, and a peer has to reconnect."""
    broker = cluster.broker
    if broker is None or not _free(cluster, broker, 3.0):
        return False
    lift = _limit(broker, resource.RLIMIT_NOFILE, broker.n_files() + 4)
    crowd = contextlib.ExitStack()
    address = parse_endpoint(cluster.proxy.endpoints[CLIENTS - 1])
    for _ in range(12):
        crowd.enter_context(socket.create_connection(address))
    cluster.proxy.inject(read_fault({"kind": "cut", "connections": "one", "pair": 2}))
    cluster.later(1.5, crowd.close)
    cluster.later(1.5, lift)
    return True


@_fault("slow consumer", 2)
def _slow_consumer(cluster: Cluster, luck: Random) -> bool:
    """A client that asks for as much as it may, and reads nothing."""
    if not _free(cluster, cluster.broker, 3.0):
        return False
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger, dealer.rcvhwm, dealer.rcvbuf = 0, 1, 1 << 16
    dealer.connect(cluster.proxy.endpoints[CLIENTS - 1])
    name = f"slow-{time.monotonic_ns()}"
    dealer.send_multipart(encode(m.ClientHello(name, 1, name, 0)).frames)
    for number in range(8):
        request_id = m.RequestId(name, 1, number)
        fields = ("input_embeddings", "", 0, 0, "", "", 30.0, ())
        dealer.send_multipart(encode(m.Request(request_id, *fields)).frames)
    cluster.later(3.0, lambda: context.destroy(linger=0))
    return True
