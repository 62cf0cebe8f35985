"""The load generator: many clients in one process, of which a few ask at any time.

``python -m tests.bench.load BROKER DIRECT PID CLIENTS SECONDS`` prints one line of JSON. All
clients are connected to the broker and send it their heartbeats throughout, also while the direct
way is measured; who asks next goes round, so that all of them do.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from tests.bench.light import HEARTBEAT_S, LightClient
from tests.bench.processes import cpu_s, raise_descriptor_limit

#: Requests under way at once where the rate is measured; the same for every number of clients, so
#: that only that number differs.
IN_FLIGHT = 10
_PATIENCE_S = 30.0
#: The two ways take turns of this length.
_TURN_S = 0.25


class Beats:
    """The heartbeats of clients, spread evenly over the interval."""

    def __init__(self, clients: Sequence[LightClient]) -> None:
        self._clients = deque(clients)
        self._apart_s = HEARTBEAT_S / len(clients)
        self._next_at = time.perf_counter()

    def __call__(self) -> None:
        """Send what is due."""
        while self._next_at <= time.perf_counter():
            self._clients[0].beat()
            self._clients.rotate(-1)
            self._next_at += self._apart_s


class Asking:
    """Takes turns among clients so that a number of requests is always under way."""

    def __init__(self, clients: Sequence[LightClient], beats: Beats) -> None:
        #: who has nothing under way, longest first
        self._free = deque(clients)
        self._beats = beats
        self._asked_at: dict[LightClient, float] = {}
        self._poller = zmq.Poller()

    def ask(self, in_flight: int, seconds: float) -> list[float]:
        """Seconds that each reply took, of all that were asked for within so many seconds."""
        ends_at = time.perf_counter() + seconds
        taken: list[float] = []
        while time.perf_counter() < ends_at:
            while len(self._asked_at) < in_flight:
                self._ask()
            self._beats()
            taken += self._take()
        while self._asked_at:
            taken += self._take()
        return taken

    def _ask(self) -> None:
        client = self._free.popleft()
        self._poller.register(client.socket, zmq.POLLIN)
        self._asked_at[client] = time.perf_counter()
        client.ask()

    def _take(self) -> list[float]:
        ready = {sock for sock, _ in self._poller.poll(1000 * _PATIENCE_S)}
        if not ready:
            raise TimeoutError(f"no reply within {_PATIENCE_S} s")
        taken = []
        for client in [client for client in self._asked_at if client.socket in ready]:
            reply = client.take()
            if reply is not None:
                taken.append(time.perf_counter() - self._asked_at.pop(client))
                self._poller.unregister(client.socket)
                client.acknowledge(reply)
                self._free.append(client)
        return taken


def greet(clients: Sequence[LightClient]) -> None:
    """Wait until the broker has welcomed all of them."""
    give_up_at = time.monotonic() + _PATIENCE_S
    while not all(client.welcome for client in clients):
        if time.monotonic() > give_up_at:
            raise TimeoutError(f"not all of {len(clients)} clients were welcomed")
        for client in clients:
            client.take()
        time.sleep(0.02)


def measure(broker: str, direct: str, pid: int, count: int, seconds: float) -> dict[str, float]:
    context = zmq.Context()
    context.max_sockets = 8192
    clients = [LightClient(context, broker, f"c{number}") for number in range(count)]
    greet(clients)
    beats = Beats(clients)
    through = Asking(clients, beats)
    beside = Asking([LightClient(context, direct, "direct")], beats)
    in_flight = min(count, IN_FLIGHT)
    through.ask(in_flight, seconds / 8)  # the first ones make memory and find their way
    brokered: list[float] = []
    alone: list[float] = []
    ends_at = time.perf_counter() + 2 * seconds
    while time.perf_counter() < ends_at or not alone:
        alone += beside.ask(1, _TURN_S)
        brokered += through.ask(1, _TURN_S)
    at_rest_s, rested_s = busy(pid, lambda: rest(beats, seconds / 2))
    replies: list[float] = []
    busy_s, took_s = busy(pid, lambda: replies.extend(through.ask(in_flight, seconds)))
    context.destroy(linger=0)
    return {
        "through_p50_s": statistics.median(brokered),
        "through_p99_s": percentile(brokered, 99),
        "direct_p50_s": statistics.median(alone),
        "direct_p99_s": percentile(alone, 99),
        "requests_per_s": len(replies) / took_s,
        "cpu_s_per_request": busy_s / len(replies),
        "cpu_s_per_s_at_rest": at_rest_s / rested_s,
    }


def busy(pid: int, work: Callable[[], None]) -> tuple[float, float]:
    """``(CPU seconds of that process, seconds)`` while this one does some work."""
    cpu_began_s, began = cpu_s(pid), time.perf_counter()
    work()
    return cpu_s(pid) - cpu_began_s, time.perf_counter() - began


def rest(beats: Beats, seconds: float) -> None:
    """Heartbeats and nothing else."""
    ends_at = time.perf_counter() + seconds
    while time.perf_counter() < ends_at:
        beats()
        time.sleep(0.001)


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


def main(broker: str, direct: str, *numbers: Any) -> None:
    pid, count, seconds = numbers
    raise_descriptor_limit()
    print(json.dumps(measure(broker, direct, int(pid), int(count), float(seconds))))


if __name__ == "__main__":
    main(*sys.argv[1:])
