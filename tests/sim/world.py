"""Processes, a network and a clock in one loop; every event is followed by the invariants."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from broker.protocol import Limits, Packet, decode
from tests.sim import endings, faults
from tests.sim.actors import Ask, ClientProcess, WorkerProcess
from tests.sim.invariants import Invariants
from tests.sim.network import Network
from tests.sim.peers import LINGER_S, BrokerProcess, PeerProcess, Process
from tests.sim.violation import InvariantError
from trainer_client.core import Deliver, Fail

if TYPE_CHECKING:
    from tests.sim.schedule import Op, Schedule
    from tests.sim.story import Story

#: Time for what has no deadline of its own; a broker gives a request up by its ttl at the latest.
_SETTLE_S = 200.0
#: More events than this in one schedule is a livelock.
_MAX_EVENTS = 10_000


class World:
    """One schedule on its way."""

    def __init__(self, schedule: Schedule, story: Story | None = None) -> None:
        self.schedule = schedule
        self.story = story
        self.now = 0.0
        self.events = 0
        self.endpoints = schedule.endpoints
        self.network = Network(self)
        self.brokers: dict[str, BrokerProcess] = {}
        self.workers: dict[str, WorkerProcess] = {}
        self.clients: dict[str, ClientProcess] = {}
        #: earlier lives that still run beside their successors
        self.leftovers: list[PeerProcess] = []
        self.clock_offsets: dict[str, float] = {}
        #: name -> how to start it again
        self.recipes: dict[str, Callable[[int], Process]] = {}
        self.lives: dict[str, int] = {}
        self.asks: dict[Any, Ask] = {}
        self.by_label: dict[int, Ask] = {}
        self.unfinished: set[Ask] = set()
        #: losses of workers, clock steps and the like: what can explain an error
        self.seen: dict[str, int] = {}
        #: peers without a core, of whom a broker may remember something while they are there
        self.rude_names: set[str] = set()
        #: everyone leaves for good
        self.closing = False
        self.invariants = Invariants(self)
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = 0
        self._packets: dict[Any, Packet] = {}
        self._limits = Limits()

    # -- the loop -------------------------------------------------------------------------------

    def run(self) -> None:
        """Play the schedule to its end. Raises :class:`InvariantError`, or what a core raised."""
        self.play_until(self.schedule.ends_at)
        self.tell("*", "the faults stop")
        faults.heal_everything(self)
        for ask in self.unfinished:
            ask.healed_with_s = ask.deadline - ask.client.now
        self._until(self.now + _SETTLE_S, lambda: not self.unfinished)
        endings.check_all_ended(self)
        self._until(self.now + _SETTLE_S, lambda: not endings.restless(self))
        endings.check_drained(self)
        self.tell("*", "everyone but the brokers leaves")
        self.closing = True
        for peer in [*self.clients.values(), *self.workers.values(), *self.leftovers]:
            peer.leave()
        self._until(self.now + _SETTLE_S, self._silent)
        endings.check_forgotten(self)

    def play_until(self, end: float) -> None:
        """Play the operations; what comes after them is not played."""
        for op in self.schedule.ops:
            self.at(op.at, self._perform, op)
        self._until(end, lambda: False)

    def _silent(self) -> bool:
        return all(broker.core.next_timer is None for broker in self.brokers.values())

    def _until(self, end: float, done: Callable[[], bool]) -> None:
        queue = self._queue
        while queue and queue[0][0] <= end and not done():
            self.now, _, call, args = heapq.heappop(queue)
            call(*args)
        if queue and not done():
            self.now = end

    def at(self, when: float, call: Callable[..., None], *args: Any) -> None:
        self._numbers += 1
        heapq.heappush(self._queue, (when, self._numbers, call, args))

    def later(self, wait_s: float, call: Callable[..., None], *args: Any) -> None:
        self.at(self.now + wait_s, call, *args)

    def witness(self, process: Process, event: Any, actions: list[Any], now: float) -> None:
        """Every event of every core comes by here."""
        self.events += 1
        if self.events > _MAX_EVENTS:
            raise InvariantError("livelock", f"{self.events} events, and no end")
        if self.story is not None:
            self.story.event(self.now, process, event, actions)
        self.invariants.after(process, event, actions, now)

    def tell(self, who: object, what: str) -> None:
        if self.story is not None:
            self.story.note(self.now, who, what)

    def saw(self, what: str) -> None:
        """Count something that can explain an error."""
        self.seen[what] = self.seen.get(what, 0) + 1

    def _perform(self, op: Op) -> None:
        self.tell("!", str(op))
        faults.KINDS[op.kind](self, op.who, **op.how)

    # -- packets --------------------------------------------------------------------------------

    def remember(self, packet: Packet) -> None:
        self._packets[packet.frames[0]] = packet

    def packet(self, frames: tuple[Any, ...]) -> Packet:
        """The packet with these frames; each header is decoded once."""
        known = self._packets.get(frames[0])
        if known is None:
            known = self._packets[frames[0]] = decode(frames, self._limits)
        if known.frames is frames:
            return known
        return replace(known, frames=frames)

    # -- life and death -------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """Begin the next life of a peer."""
        self.lives[name] = self.lives.get(name, 0) + 1
        self.clock_offsets.setdefault(name, 100.0 + 10.0 * len(self.clock_offsets))
        process = self.recipes[name](self.lives[name])
        registry: dict[str, Any] = self.registry(process)
        registry[name] = process
        self.tell(process, "starts")

    def registry(self, process: Process) -> Any:
        if isinstance(process, BrokerProcess):
            return self.brokers
        return self.workers if isinstance(process, WorkerProcess) else self.clients

    def process(self, name: str) -> Any:
        """The current life of a peer, or None while it is down."""
        found = self.brokers.get(name) or self.workers.get(name) or self.clients.get(name)
        return found if found is not None and found.alive else None

    def everyone(self) -> list[Process]:
        return [
            process
            for process in (
                *self.brokers.values(),
                *self.workers.values(),
                *self.clients.values(),
                *self.leftovers,
            )
            if process.alive
        ]

    def crash(self, process: Process, down_s: float = 0.5, *, quietly: bool = False) -> None:
        """The process ends at once and is started again after a while."""
        if not process.alive:
            return
        self.tell(process, "dies" + (" with its host" if quietly else ""))
        process.die(quietly=quietly)
        self.gone(process, down_s)

    def gone(self, process: Process, down_s: float, *, lost: bool = True) -> None:
        """A life has ended: nobody waits for its requests, and the next one begins."""
        if lost:
            self.saw("loss")
        if isinstance(process, ClientProcess):
            self.unfinished -= {ask for ask in self.unfinished if ask.client is process}
        if process not in self.leftovers:
            self.later(down_s, self._start_again, process)

    def _start_again(self, process: Process) -> None:
        if not self.closing and self.lives[process.name] == process.life:
            self.start(process.name)

    def exited(self, worker: WorkerProcess, error: str) -> None:
        """A worker left by itself, drained or refused."""
        self.tell(worker, f"exits {error}")
        worker.die(quietly=False, after_s=LINGER_S)
        self.gone(worker, LINGER_S + 0.3, lost=bool(error or worker.core.held))

    # -- requests -------------------------------------------------------------------------------

    def submit(self, client: ClientProcess, label: int, nature: str, **how: Any) -> None:
        ask = client.submit(label, nature, **how)
        self.by_label[label] = ask
        if not ask.ended:
            self.unfinished.add(ask)

    def ended(self, client: ClientProcess, action: Deliver | Fail) -> None:
        ask = self.asks.get(action.id)
        endings.check_ending(self, client, ask, action)
        assert ask is not None
        ask.ended = "result" if isinstance(action, Deliver) else action.code
        endings.check_served(self, ask)
        self.unfinished.discard(ask)
