"""Line g: how soon work goes on elsewhere after a worker, and everywhere after the broker.

``python -m tests.bench.recovery`` runs it alone. All times are of the machine's monotonic clock,
which the broker, its peers and this process share, and are told by the broker's ``/trace`` and by
replies.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from broker.core import BrokerConfig
from tests.bench.lines import Line, Progress
from tests.bench.paced import SLOW_S
from tests.bench.pool import PATIENCE_S, Pool, pool
from tests.bench.ranks import batches, client, sample
from tests.hosts.cluster import CLIENTS, HOSTS, Hosts
from tests.hosts.crowd import crowd
from tests.hosts.lab import Lab, why_not
from trainer_client.targets.remote import RemoteEagle3TargetModel

#: Shorter than the default, so that several rounds take no minute. A second run of a slow request,
#: which would come before, is off.
LIVENESS_S = 2.0
_STRICT = ("--liveness-s", LIVENESS_S, "--heartbeat-s", LIVENESS_S / 5, "--hedge-after", 0)
_SLACK_S = 0.2
_BACK_S = 1.0
#: The rate is that of the replies in so many seconds, and full where it is within a tenth of what
#: it was: forty replies are not counted much more exactly.
_WINDOW_S = 0.5
_FULL = 0.9
#: How long the rate is looked at before the broker ends, and after another is there.
_SEEN_S = 2.0
_RANKS = 4
#: Between looks for a broker; nothing is timed by them.
_LOOK_S = 0.05
#: How long a broker stands still, beside clients on another host, and how soon all are served then.
_STILL_S, _SERVED_S = 20.0, 1.0
_CLIENTS = 6
_STOOD = "broker stood still, six clients are served"
#: How long a broker is away: as long as it takes to start, and longer than peers try again quickly.
_OUTAGES_S = (0.0, 2.0)


def measure(progress: Progress, *, quick: bool) -> list[Line]:
    """Seconds until lost work runs elsewhere, and until a restarted broker is at full rate."""
    kills, silences, outages = (1, 1, 1) if quick else (3, 2, 2)
    progress("workers are lost")
    workers = ["tests.bench.paced:slow"] * (kills + silences + 1)
    with pool(workers, _STRICT) as started, client(started.clients) as asking:
        killed = [_elsewhere_s(started, asking, signal.SIGKILL) for _ in range(kills)]
        silent = [_elsewhere_s(started, asking, signal.SIGSTOP) for _ in range(silences)]
    with pool(["tests.bench.paced:brisk"] * 4) as started, _stream(started) as replied_at:
        back = []
        for outage_s in _OUTAGES_S[:outages]:
            back.append(_full_rate_s(started, replied_at, outage_s))
            progress(f"broker away {outage_s:g} s and its start: full rate {back[-1]:.2f} s after")
    stood = [
        *_stood_still_s(progress, rounds=1 if quick else 5, still_s=4.0 if quick else _STILL_S)
    ]
    wants = f"<= {LIVENESS_S + _SLACK_S:g} (the liveness limit is {LIVENESS_S:g})"
    return [
        _line("worker killed, request runs elsewhere", killed, wants, LIVENESS_S + _SLACK_S),
        _line("worker silent, request runs elsewhere", silent, wants, LIVENESS_S + _SLACK_S),
        _line("broker back, full rate", back, f"<= {_BACK_S:g}", _BACK_S),
        *([_line(_STOOD, stood, f"<= {_SERVED_S:g}", _SERVED_S)] if stood else []),
    ]


def _line(name: str, seconds: list[float], wants: str, limit_s: float) -> Line:
    value = statistics.median(seconds)
    return Line(name, value, "s", wants, value <= limit_s)


def _elsewhere_s(started: Pool, asking: RemoteEagle3TargetModel, blow: signal.Signals) -> float:
    """Seconds from the blow until the request that a worker had is computed by another.

    That it is computed is known when it is done, and then it took as long as its target waits.
    """
    asked = sample()
    reply = asking.generate_batch_async(asked.input_ids, asked.attention_mask, asked.loss_mask)
    worker = _computing(started)
    pid = started.pids.pop(worker)
    began = time.monotonic()
    os.kill(pid, blow)
    reply.result()
    os.kill(pid, signal.SIGKILL)
    done = started.look("/trace")["requests"][-1]
    assert done["worker"] != worker, "the request was answered by the worker that was lost"
    return float(done["answered_at"]) - SLOW_S - began


def _computing(started: Pool) -> str:
    """The name of the worker that has the request."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        for worker in started.look("/status")["workers"]:
            if worker["running"]:
                return str(worker["worker"])
    raise AssertionError("no worker was given the request")


def _full_rate_s(started: Pool, replied_at: list[float], outage_s: float) -> float:
    """Seconds from the new broker's beginning until replies come as fast as before it."""
    began = time.monotonic()
    time.sleep(_SEEN_S)
    per_window = _WINDOW_S * _count(replied_at, began, began + _SEEN_S) / _SEEN_S
    started.kill_broker()
    time.sleep(outage_s)
    started.broker()
    while not (status := started.look("/status")):
        assert time.monotonic() < began + PATIENCE_S, "no broker came back"
        time.sleep(_LOOK_S)
    time.sleep(_SEEN_S + _BACK_S)
    back_at = status["now_s"] - status["uptime_s"]
    for at in replied_at[bisect.bisect(replied_at, back_at) :]:
        if _count(replied_at, at, at + _WINDOW_S) >= _FULL * per_window:
            return at - back_at
    return _SEEN_S + _BACK_S  # not within the time that was looked at


def _stood_still_s(progress: Progress, *, rounds: int, still_s: float) -> Iterator[float]:
    """Seconds from SIGCONT until each of six clients on another host is served, in each round;
    none where no hosts can be made.
    """
    if why := why_not():
        progress(f"{_STOOD}: not measured, {why}")
        return
    with Lab(HOSTS) as lab, tempfile.TemporaryDirectory() as directory:
        hosts = Hosts(lab, Path(directory), BrokerConfig().liveness_s)
        hosts.broker()
        hosts.worker("w1")
        hosts.worker("w2")
        hosts.wait_for_workers("w1", "w2")
        try:
            endpoint = f"tcp://{lab.address('broker')}:{CLIENTS}"
            with crowd(lab, "trainer", endpoint, _CLIENTS) as asking:
                for _ in range(rounds):
                    hosts.signal("broker", "broker", signal.SIGSTOP)
                    time.sleep(still_s)
                    began = time.monotonic()
                    hosts.signal("broker", "broker", signal.SIGCONT)
                    yield asking.served_after_s(began, PATIENCE_S)
                    progress(f"broker stood still for {still_s:g} s")
        finally:
            hosts.close()


def _count(replied_at: list[float], since: float, until: float) -> int:
    return bisect.bisect(replied_at, until) - bisect.bisect(replied_at, since)


@contextlib.contextmanager
def _stream(started: Pool) -> Iterator[list[float]]:
    """When replies come to ranks that ask for more at once, in order."""
    replied_at: list[float] = []
    leaving = threading.Event()

    def take(backend: RemoteEagle3TargetModel) -> None:
        for _ in batches(backend, prefetch=True):
            with lock:
                replied_at.append(time.monotonic())
            if leaving.is_set():
                return

    lock = threading.Lock()
    with contextlib.ExitStack() as stack:
        backends = [stack.enter_context(client(started.clients, rank)) for rank in range(_RANKS)]
        threads = [threading.Thread(target=take, args=(backend,)) for backend in backends]
        for thread in threads:
            thread.start()
        try:
            yield replied_at
        finally:
            leaving.set()
            for thread in threads:
                thread.join()


if __name__ == "__main__":
    from tests.bench.alone import run_alone

    run_alone(measure)
