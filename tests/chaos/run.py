"""Training rounds under faults, one after the other, each compared with the undisturbed one."""

from __future__ import annotations

import hashlib
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from broker.chaos.faults import How, Which
from tests.chaos.cluster import N_WORKERS, Cluster, Process
from tests.chaos.faults import network_fault, process_fault

_TURN_S = 0.01
_STATUS_S = 0.5
#: A round that takes longer than this has hung.
_ROUND_S = 300.0
#: Seconds between faults, on average; one in so many strikes a process.
_EVERY_S, _PROCESS_SHARE = 1.6, 0.25
#: The last share of the time ends no broker and no worker: a leak has time to show.
_GENTLE_SHARE = 0.3
#: What a process may have more at the end than in the undisturbed run.
_SPARE_FILES, _SPARE_MIB = 12, 150.0


@dataclass
class Steps:
    """Watches a run's metrics file: when each training step was seen."""

    gaps_s: list[float] = field(default_factory=list)

    #: steps that were seen
    count: int = 0
    _size: int = 0
    _seen_at: float | None = None

    def look(self, metrics: Path, now: float) -> int:
        """How many steps there are."""
        size = metrics.stat().st_size if metrics.exists() else 0
        if size != self._size:
            self._size = size
            steps = metrics.read_bytes().count(b"\n") if size else 0
            if steps > self.count and self._seen_at is not None:
                self.gaps_s.append(now - self._seen_at)
            self.count, self._seen_at = steps, now
        return self.count

    def interrupted(self) -> None:
        """The trainer was ended: the time until its next step is no stall."""
        self._seen_at = None

    @property
    def median_s(self) -> float:
        return statistics.median(self.gaps_s) if self.gaps_s else 0.0

    @property
    def longest_stall_s(self) -> float:
        return max(self.gaps_s, default=0.0)


@dataclass
class Result:
    """What a run came to. ``broken`` says, in sentences, which promises did not hold."""

    seconds: float = 0.0
    rounds: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    counters: dict[str, int] = field(default_factory=dict)
    longest_stall_s: float = 0.0
    median_step_s: float = 0.0
    weights_identical: bool = True
    orphans: int = 0
    files_more: int = 0
    mib_more: float = 0.0
    #: from the moment at which a broker listened again to the next training step
    restart_costs_s: list[float] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


class Restarts:
    """Ends the broker again and again, for longer each time, and takes the time from when it
    listens again to the next training step.
    """

    AWAY_S = (0.0, 0.5, 1.5, 3.0)
    #: between two of them, in which what the last one cost is over
    _REST_STEPS = 20

    def __init__(self, cluster: Cluster, steps: Steps, n_restarts: int) -> None:
        self.costs_s: list[float] = []
        self._cluster = cluster
        self._steps = steps
        self._n_restarts = n_restarts
        self._due_step = 0
        self._away: Process | None = None
        self._back_at: float | None = None
        self._steps_before = 0

    def strike(self) -> None:
        """Whatever is next."""
        now = time.monotonic()
        broker = self._cluster.broker
        if self._away is None:
            wanted = len(self.costs_s) < self._n_restarts and self._steps.count >= self._due_step
            if wanted and broker is not None and self._cluster.stepping:
                self._end(broker)
        elif self._back_at is None:
            if broker not in (None, self._away) and self._cluster.listens():
                self._back_at, self._steps_before = now, self._steps.count
        elif self._steps.count > self._steps_before:
            self.costs_s.append(now - self._back_at)
            self._away, self._back_at = None, None
            self._due_step = self._steps.count + self._REST_STEPS

    def _end(self, broker: Process) -> None:
        number = len(self.costs_s)
        self._cluster.broker_away_s = self.AWAY_S[number % len(self.AWAY_S)]
        how = signal.SIGTERM if number % 2 else signal.SIGKILL
        broker.may_end |= {-how}
        broker.signal(how)
        self._away = broker


class Run:
    """One cluster, from the undisturbed round to the last one."""

    def __init__(self, directory: Path, seed: int, steps: int) -> None:
        self.luck = Random(seed)
        self.cluster = Cluster(directory, seed, steps)
        self.directory = directory
        self.result = Result()
        self.steps = Steps()
        self.hung = False
        self._status_at = 0.0

    def prepare(self) -> None:
        """Start everything, and train without faults."""
        cluster = self.cluster
        cluster.start_broker()
        for number in range(N_WORKERS):
            cluster.start_worker(f"worker{number}")
        self.round("undisturbed", lambda: None)
        cluster.wait_for_workers(N_WORKERS)
        self.result.median_step_s = self.steps.median_s
        self.wanted = weights(cluster.output)
        self.usual = self._usage()
        cluster.client_counters.clear()
        self.steps = Steps()

    def chaos(self, seconds: float) -> None:
        """Rounds under all kinds of faults for so long; the last round is trained to its end."""
        began = time.monotonic()
        due = began

        def strike() -> None:
            nonlocal due
            now = time.monotonic()
            if now < due or now > began + seconds:
                return
            due = now + self.luck.uniform(0.2, 1.8) * _EVERY_S
            if self.luck.random() < _PROCESS_SHARE:
                gentle = now > began + (1 - _GENTLE_SHARE) * seconds
                name = process_fault(self.cluster, self.luck, gentle=gentle)
            else:
                name = network_fault(self.cluster, self.luck)
            self.result.faults[name] += bool(name)

        while time.monotonic() < began + seconds and not self.hung:
            self.compared(strike)
        self.result.seconds = time.monotonic() - began

    def cuts(self, n_cuts: int, every_steps: float) -> None:
        """One round in which connections are cut, one at random each time."""
        due = 0.0

        def strike() -> None:
            nonlocal due
            if self.steps.count < due or self.result.faults["cut"] >= n_cuts:
                return
            due = self.steps.count + self.luck.uniform(0, 2) * every_steps
            how = self.luck.choice(list(How))
            self.result.faults["cut"] += self.cluster.proxy.cut(Which.ONE, how)

        began = time.monotonic()
        self.compared(strike)
        self.result.seconds = time.monotonic() - began
        if self.result.faults["cut"] < n_cuts:
            self._broken(f"the round was over after {self.result.faults['cut']} cuts")

    def restarts(self, n_restarts: int) -> None:
        """One round in which the broker is restarted so often."""
        restarts = Restarts(self.cluster, self.steps, n_restarts)
        began = time.monotonic()
        self.compared(restarts.strike)
        self.result.seconds = time.monotonic() - began
        self.result.restart_costs_s = restarts.costs_s
        self.result.faults["restart broker"] = len(restarts.costs_s)
        if len(restarts.costs_s) < n_restarts:
            self._broken(f"the round was over after {len(restarts.costs_s)} restarts")

    def compared(self, strike: Callable[[], None]) -> None:
        """A round whose weights must be those of the undisturbed one."""
        self.result.rounds += 1
        try:
            self.round(f"round{self.result.rounds}", strike)
        except TimeoutError as error:
            self._broken(str(error))
            self.hung = True
            return
        if weights(self.cluster.output) != self.wanted:
            self.result.weights_identical = False
            self._broken(f"round {self.result.rounds} trained other weights")

    def round(self, name: str, strike: Callable[[], None]) -> None:
        """Train from the first step to the last, whatever happens on the way."""
        cluster = self.cluster
        cluster.start_trainer(self.directory / name)
        end = time.monotonic() + _ROUND_S
        self.steps.interrupted()
        while not self._trained():
            if time.monotonic() > end:
                raise TimeoutError(f"{name} has hung: {cluster.status()}")
            seen = self.steps.look(cluster.output / "metrics.jsonl", time.monotonic())
            cluster.stepping = seen > 0
            strike()
            self._turn()
        cluster.finish_round()

    def finish(self) -> Result:
        """Heal, look for what is left over, end everything."""
        cluster, result = self.cluster, self.result
        cluster.proxy.heal()
        end = time.monotonic() + 60
        while not cluster.settled and time.monotonic() < end:
            self._turn()
        try:
            cluster.wait_for_workers(N_WORKERS)
        except TimeoutError as error:
            self._broken(f"after all faults were healed, {error}")
        self._measure_leaks()
        result.counters = self._counters()
        result.longest_stall_s = max(0.0, self.steps.longest_stall_s - result.median_step_s)
        result.faults += Counter()  # without those that never struck
        cluster.close()
        result.orphans = len(cluster.orphans())
        if result.orphans:
            self._broken(f"processes are left: {cluster.orphans()}")
        result.broken = cluster.broken
        return result

    # -- inside -----------------------------------------------------------------------------------

    def _trained(self) -> bool:
        """Whether the trainer is through; one that was ended is started again."""
        trainer = self.cluster.trainer
        assert trainer is not None
        if trainer.alive:
            return False
        code = trainer.child.returncode
        if code == 0:
            return True
        log = self.cluster.log_of(trainer)
        if code not in trainer.may_end or trainer.wants not in log:
            tail = " | ".join(log.splitlines()[-3:])
            self._broken(f"{trainer.log} ended with {code}: {tail}")
        self.steps.interrupted()
        self.cluster.start_trainer(self.cluster.output)
        return False

    def _turn(self) -> None:
        self.cluster.turn()
        if (now := time.monotonic()) > self._status_at + _STATUS_S:
            self._status_at = now
            self.cluster.status()
        time.sleep(_TURN_S)

    def _broken(self, text: str) -> None:
        self.cluster.broken.append(text)

    def _usage(self) -> dict[str, tuple[int, float]]:
        processes = [self.cluster.broker, *self.cluster.workers.values()]
        return {p.name: (p.n_files(), p.rss_mib()) for p in processes if p is not None}

    def _measure_leaks(self) -> None:
        for name, (files, mib) in self._usage().items():
            usual_files, usual_mib = self.usual.get(name, self.usual["worker0"])
            self.result.files_more = max(self.result.files_more, files - usual_files)
            self.result.mib_more = max(self.result.mib_more, mib - usual_mib)
            if files > usual_files + _SPARE_FILES:
                self._broken(f"{name} has {files} files open, undisturbed {usual_files}")
            if mib > usual_mib + _SPARE_MIB:
                self._broken(f"{name} has {mib:.0f} MiB, undisturbed {usual_mib:.0f}")

    def _counters(self) -> dict[str, int]:
        brokers: Counter[str] = Counter()
        for counters in self.cluster.broker_counters.values():
            brokers.update(counters)
        clients = self.cluster.client_counters
        return {
            "requests": brokers["requests"],
            "resends": brokers["resends"],
            "requeues": brokers["requeues"],
            "answered again": brokers["answered_again"],
            "duplicates dropped": clients["duplicates"] + brokers["late_answers"],
            "damaged": clients["damaged"] + brokers["bad_messages"],
        }


def weights(output: Path) -> str:
    """One name for all weights of a run's draft."""
    files = sorted((output / "draft").glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def as_json(result: Result, **more: Any) -> dict[str, Any]:
    """The result as ``build/chaos.json`` has it."""
    return {
        **more,
        **vars(result),
        "n_faults": sum(result.faults.values()),
        "holds": not result.broken,
    }
