"""Playing schedules: to an outcome, to the smallest one that still fails, to its story."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace

from tests.sim.schedule import Op, Schedule, make
from tests.sim.story import Story
from tests.sim.violation import InvariantError
from tests.sim.world import World


@dataclass(frozen=True)
class Outcome:
    """``failure`` names the invariant, or where a core raised; empty when all held."""

    failure: str
    text: str
    events: int
    requests: int
    results: int

    def __bool__(self) -> bool:
        return not self.failure


def play(schedule: Schedule, story: Story | None = None) -> Outcome:
    """Run one schedule to its end or to the first thing that is wrong."""
    world = World(schedule, story)
    failure = text = ""
    try:
        world.run()
    except InvariantError as error:
        failure, text = error.name, str(error)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        failure = f"{type(error).__name__} in {frame.name}"
        text = f"{failure}: {frame.line}: {error}"
    results = sum(ask.ended == "result" for ask in world.asks.values())
    return Outcome(failure, text, world.events, len(world.asks), results)


def shrink(schedule: Schedule, failure: str, *, tries: int = 400) -> Schedule:
    """The smallest schedule found that fails in the same way (ddmin, Zeller & Hildebrandt 2002)."""
    ops = list(schedule.ops)
    chunk = max(1, len(ops) // 2)
    while tries > 0:
        shorter, tries = _without_a_chunk(schedule, ops, chunk, failure, tries)
        if len(shorter) < len(ops):
            ops = shorter
            chunk = min(chunk, max(1, len(ops) // 2))
        elif chunk == 1:
            break
        else:
            chunk //= 2
    return replace(schedule, ops=tuple(ops))


def _without_a_chunk(
    schedule: Schedule, ops: list[Op], chunk: int, failure: str, tries: int
) -> tuple[list[Op], int]:
    at = 0
    while at < len(ops) and tries > 0:
        candidate = [*ops[:at], *filter(_starts_a_broker, ops[at : at + chunk]), *ops[at + chunk :]]
        tries -= 1
        if candidate != ops and play(replace(schedule, ops=tuple(candidate))).failure == failure:
            ops = candidate
        else:
            at += chunk
    return ops, tries


def _starts_a_broker(op: Op) -> bool:
    """Without one everybody is lost, whatever it was that failed."""
    return op.how.get("role") == "broker"


def tell(schedule: Schedule) -> str:
    """The story of a schedule, with its operations first."""
    story = Story()
    outcome = play(schedule, story)
    ops = [f"{op.at:9.3f}  {op}" for op in schedule.ops]
    end = outcome.text or f"all held: {outcome.results} results of {outcome.requests} requests"
    return "\n".join(["operations:", *ops, "", "story:", *story.lines, "", end])


def explain(seed: int) -> str:
    """Shrink the failing schedule of a seed and tell its story."""
    schedule = make(seed)
    outcome = play(schedule)
    if not outcome:
        schedule = shrink(schedule, outcome.failure)
    return f"seed {seed}\n{tell(schedule)}\nreplay: make sim SEED={seed}"
