"""The choice of a worker, against looking at every one of them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from broker.core.schedule import _SAME_SPEED, Candidates, Choice, expected_finish, learn_speed
from broker.core.state import WorkerSession
from broker.protocol.messages import RequestId

SPEEDS = st.none() | st.just(0.0) | st.floats(1e-6, 1e2)


def make_worker(number: int, speed: float | None, busy_until: float, credits: int) -> WorkerSession:
    worker = WorkerSession(f"w{number}", 1, "m", "m", b"%d" % number, credits, 0.0)
    worker.seconds_per_token, worker.busy_until = speed, busy_until
    return worker


workers = st.lists(
    st.builds(
        lambda speed, busy, credits: (speed, busy, credits),
        SPEEDS,
        st.floats(0, 100),
        st.integers(0, 2),
    ),
    max_size=12,
).map(lambda drawn: [make_worker(number, *one) for number, one in enumerate(drawn)])


@given(workers, st.integers(1, 10_000), st.floats(0, 100), st.sets(st.integers(0, 12)))
def test_it_is_as_good_as_looking_at_all(
    there: list[WorkerSession], n_tokens: int, now: float, avoided: set[int]
) -> None:
    free = Candidates(lambda worker: worker.free > 0)
    for worker in there:
        free.put(worker)
    avoid = {f"w{number}" for number in avoided}
    chosen = free.choose(n_tokens, now, avoid)
    free.validate()
    candidates = [worker for worker in there if worker.free]
    preferred = [worker for worker in candidates if worker.id not in avoid]
    if not preferred:
        assert chosen is None
        return
    assert chosen in preferred
    best = min(expected_finish(worker, n_tokens, now) for worker in preferred)
    computing = (chosen.seconds_per_token or 0.0) * n_tokens
    assert expected_finish(chosen, n_tokens, now) - best <= computing * (1 - 1 / _SAME_SPEED) + 1e-6


@settings(deadline=None)  # 200 turns, on a machine that does other things too
@given(st.data())
def test_changes_are_seen_and_nothing_piles_up(data: st.DataObject) -> None:
    free = Candidates(lambda worker: worker.free > 0)
    there = [make_worker(number, 0.001, 0.0, 2) for number in range(4)]
    for turn in range(200):
        worker = there[data.draw(st.integers(0, 3))]
        change = data.draw(st.sampled_from(["assign", "answer", "leave", "speed"]))
        if change == "assign" and worker.free:
            worker.running[RequestId("c", 1, turn)] = 0.0
            worker.busy_until += 1.0
        elif change == "answer" and worker.running:
            worker.running.popitem()
        elif change == "speed":
            worker.seconds_per_token = data.draw(SPEEDS)
        free.discard(worker) if change == "leave" else free.put(worker)
        free.validate()
    assert sum(map(len, free._classes.values())) <= 4 * len(there) + 65


@given(st.lists(st.tuples(st.integers(1, 1 << 40), st.floats(0, 1e9)), max_size=40))
def test_the_speed_of_a_pool_stays_exact_whatever_its_workers_say(
    answers: list[tuple[int, float]],
) -> None:
    """One after another joins, says how long it took for how many tokens, and leaves again."""
    choice = Choice()
    for number, (n_tokens, compute_s) in enumerate([(1, 5e-324), *answers]):
        worker = make_worker(number, None, 0.0, 1)
        learn_speed(worker, n_tokens, compute_s)
        choice.put(worker)
        choice.validate()
        assert choice.choose_for_later(n_tokens, 0.0) is not None
        if number % 2:
            choice.discard(worker)
            choice.validate()
