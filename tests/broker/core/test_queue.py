"""The order of service, against sorting everything anew each time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from broker.core.queue import FairQueue


@dataclass(eq=False)
class Asked:
    job: str
    client: str
    step: int
    n_tokens: int = 10


STEPS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4)), min_size=1, max_size=40)


@given(STEPS, st.data())
def test_within_a_job_the_earliest_step_comes_first_and_ranks_take_turns(
    asked: list[tuple[str, int]], data: st.DataObject
) -> None:
    queue = FairQueue()
    entries = [Asked("job", client, step) for client, step in asked]
    for entry in entries:
        queue.push(entry)
    turns: Counter[tuple[str, int]] = Counter()
    keys = {}
    for arrival, entry in enumerate(entries):
        keys[entry] = (entry.step, turns[entry.client, entry.step], arrival)
        turns[entry.client, entry.step] += 1
    removed = data.draw(st.sets(st.sampled_from(entries))) if entries else set()
    for entry in removed:
        queue.remove(entry)
    left = sorted(set(entries) - removed, key=keys.__getitem__)
    assert list(queue) == [queue.at(place) for place in range(len(left))] == left
    assert len(queue) == len(left)
    assert queue.at(len(left)) is None
    for entry in left:
        assert queue.at(0) is entry
        queue.take(entry)


def test_jobs_share_by_tokens() -> None:
    queue = FairQueue()
    for number in range(300):
        queue.push(Asked("short", "a", number, n_tokens=100))
        queue.push(Asked("long", "b", number, n_tokens=300))
    served = Counter[str]()
    for _ in range(200):
        entry = queue.at(0)
        assert isinstance(entry, Asked)
        queue.take(entry)
        served[entry.job] += entry.n_tokens
    assert abs(served["short"] - served["long"]) <= 300


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=60))
def test_jobs_that_have_gone_leave_nothing_behind(visits: list[tuple[int, bool]]) -> None:
    queue = FairQueue()
    for job, served in visits:
        entry = Asked(str(job), "a", 0)
        queue.push(entry)
        queue.take(entry) if served else queue.remove(entry)
        assert not queue._jobs
        assert not queue._order


def test_what_was_lost_on_its_way_comes_first() -> None:
    queue = FairQueue()
    early, late = Asked("job", "a", 1), Asked("job", "a", 7)
    queue.push(early)
    queue.push(late, again=True)
    assert queue.at(0) is late
