"""What overlaps what, shown by events and not by time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from broker.protocol import Limits, Packet
from tests.vocab import shuffled
from tests.worker.core.test_machine import Rig
from tests.worker.supervision.requests import generate, offer
from worker.answers import Answerer, Work
from worker.core import Compute, ComputeTogether, Forget, Learn
from worker.errors import WorkerError
from worker.metrics import WorkerMeasures
from worker.pipeline import Pipeline
from worker.service import Worker
from worker.supervision.mapping import VocabMapping
from worker.targets.contract import describe
from worker.targets.foreign import ForeignTarget
from worker.targets.stub import StubTarget

VOCAB = 64
MAPPING = VocabMapping(shuffled(torch.arange(0, VOCAB, 2)), VOCAB)
IDS = torch.arange(8, 20).view(2, 6)
#: Far more than anything here takes; a test that waits so long fails.
LIMIT_S = 20.0


class Gate:
    """Something that happens once the test lets it, and that the test can wait for."""

    def __init__(self) -> None:
        self.reached = threading.Semaphore(0)
        self.open = threading.Event()

    def pass_through(self) -> None:
        self.reached.release()
        assert self.open.wait(LIMIT_S), "the gate stayed shut"

    def wait(self) -> None:
        assert self.reached.acquire(timeout=LIMIT_S), "nobody came to the gate"


class Gated(Answerer):
    """An answerer whose encoding stops at a gate."""

    gate: Gate

    def finish(self, work: Work, limits: Limits) -> Packet:
        self.gate.pass_through()
        return super().finish(work, limits)


class Piped(Rig):
    """A core with a real pipeline around a stub; the test's own thread is the I/O loop."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.target = StubTarget(vocab_size=VOCAB)
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.broken: list[Exception] = []
        self.answerer = Gated(self.target, describe(self.target), "w")
        self.answerer.gate = self.gate = Gate()
        self.pipeline = Pipeline(
            self.answerer, WorkerMeasures(), Limits, self.events.put, self.broken.append
        )
        self.pipeline.start()
        self.welcome()
        self.arrive(offer(MAPPING))

    def handle(self, event: object) -> None:
        super().handle(event)
        for action in self.done:
            if isinstance(action, (Compute, ComputeTogether, Learn, Forget)):
                self.pipeline.do(action)
        self.done.clear()

    def ask(self, number: int) -> None:
        self.arrive(generate(number, IDS, MAPPING))

    def pump(self, until: Callable[[], bool]) -> None:
        """Be the I/O loop until something holds."""
        while not until():
            self.handle(self.events.get(timeout=LIMIT_S))


@pytest.fixture
def piped(request: pytest.FixtureRequest) -> Iterator[Piped]:
    rig = Piped(**getattr(request, "param", {}))
    yield rig
    rig.gate.open.set()
    rig.pipeline.stop()
    assert not rig.broken


def test_the_next_forward_runs_before_the_answer_is_encoded(piped: Piped) -> None:
    piped.ask(1)
    piped.ask(2)
    piped.gate.wait()  # the first answer is about to be encoded, and is not yet
    piped.pump(lambda: piped.target.calls == 2)
    assert piped.answers() == []
    piped.gate.open.set()
    piped.pump(lambda: not piped.core.held)
    assert piped.answers() == ["Reply 1", "Reply 2"]


def test_no_forward_begins_while_two_answers_are_being_made(piped: Piped) -> None:
    for number in range(1, 6):
        piped.ask(number)
    piped.gate.wait()
    piped.pump(lambda: [held.stage.value for held in piped.core.held.values()].count("staged") == 2)
    stages = [held.stage.value for held in piped.core.held.values()]
    assert stages == ["staged", "staged", "waiting", "waiting", "waiting"]
    assert piped.target.calls == 2  # the third was not given to it
    piped.gate.open.set()
    piped.pump(lambda: not piped.core.held)
    assert piped.answers() == [f"Reply {number}" for number in range(1, 6)]


@pytest.mark.parametrize("piped", [{"coalesce_tokens": 1000}], indirect=True)
def test_what_waits_meanwhile_runs_together_and_is_answered_each(piped: Piped) -> None:
    held = threading.Event()
    forward = piped.target.forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        assert held.wait(LIMIT_S)
        return forward(*args, **kwargs)

    piped.target.forward = slow  # type: ignore[method-assign]
    piped.gate.open.set()
    for number in range(1, 5):
        piped.ask(number)
    held.set()
    piped.pump(lambda: not piped.core.held)
    assert piped.target.calls == 2
    assert piped.answers() == [f"Reply {number}" for number in range(1, 5)]


def test_a_thread_that_breaks_is_told_of(piped: Piped) -> None:
    piped.gate.open.set()
    piped.answerer.finish = None  # type: ignore[assignment,method-assign]
    piped.ask(1)
    piped.pipeline.stop()
    (error,) = piped.broken
    assert isinstance(error, TypeError)
    piped.broken.clear()


def test_a_target_that_cannot_is_not_asked_to_run_several() -> None:
    foreign = ForeignTarget(StubTarget(), "theirs")
    with pytest.raises(WorkerError, match="'theirs' cannot run several requests in one forward"):
        Worker(foreign, "ipc:///tmp/draftmq-no-broker-is-here", coalesce_tokens=8)
