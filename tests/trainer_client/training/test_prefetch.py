"""The prefetcher on a simulated clock: workers of known speed, a trainer of known speed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.commands import cli
from trainer_client.targets.batch import Eagle3TargetBatch
from trainer_client.training.depth import AutoDepth, Taken
from trainer_client.training.prefetch import Prefetcher
from trainer_client.training.settings import TrainSettings


class Sample:
    def __init__(self, number: int, n_tokens: int = 4) -> None:
        self.number = number
        self.input_ids = torch.full((1, n_tokens), number)
        self.attention_mask = self.loss_mask = torch.ones_like(self.input_ids)


def reply_to(ids: torch.Tensor) -> Eagle3TargetBatch:
    ones, shape = torch.ones_like(ids), ids.shape
    return Eagle3TargetBatch(
        aux_hidden_states=torch.zeros(*shape, 6),
        input_ids=ids,
        attention_mask=ones,
        loss_mask=ones,
        position_mask=torch.ones(*shape, 1, dtype=torch.bool),
        last_hidden_state=torch.zeros(*shape, 2),
    )


REPLY_BYTES = reply_to(Sample(0).input_ids).nbytes


@dataclass
class Pool:
    """Workers that take the next request as soon as they are free; time is simulated.

    ``speeds`` are requests a second; ``jitter`` spreads the times of service by so much.
    """

    speeds: Sequence[float]
    jitter: float = 0.0
    window: int = 64
    now: float = 0.0
    most_bytes: int = 0
    most_unanswered: int = 0
    cancelled: int = 0
    supports_async: bool = True
    _free_at: list[float] = field(default_factory=list)
    _open: list[Handle] = field(default_factory=list)
    _chance: random.Random = field(default_factory=lambda: random.Random(0))

    def generate_batch_async(self, ids: torch.Tensor, *_: torch.Tensor) -> Handle:
        self._free_at = self._free_at or [0.0] * len(self.speeds)
        worker = min(range(len(self.speeds)), key=lambda w: self._free_at[w])
        service_s = (1 + self.jitter * self._chance.uniform(-1, 1)) / self.speeds[worker]
        ready_at = max(self.now, self._free_at[worker]) + service_s
        self._free_at[worker] = ready_at
        handle = Handle(self, ids, ready_at)
        self._open.append(handle)
        held = sum(reply_to(each.ids).nbytes for each in self._open)
        self.most_bytes = max(self.most_bytes, held)
        unanswered = sum(not each.done() for each in self._open)
        self.most_unanswered = max(self.most_unanswered, unanswered)
        return handle


@dataclass(eq=False)
class Handle:
    pool: Pool
    ids: torch.Tensor
    ready_at: float

    def done(self) -> bool:
        return self.pool.now >= self.ready_at

    def result(self, timeout: float | None = None) -> Eagle3TargetBatch:
        self.pool.now = max(self.pool.now, self.ready_at)
        self.pool._open.remove(self)
        return reply_to(self.ids)

    def cancel(self) -> bool:
        self.pool.cancelled += 1
        return True


def prefetcher(pool: Pool, samples: Any, depth: Any = "auto", **options: Any) -> Prefetcher:
    return Prefetcher(pool, samples, depth, clock=lambda: pool.now, **options)  # type: ignore[arg-type]


def train(pool: Pool, feed: Prefetcher, step_s: float = 1.0, until_s: float = 0.0) -> float:
    """Take all results, a step each; gives the share of time waited after ``until_s``."""
    waited_before = began = 0.0
    for _ in feed:
        if pool.now <= until_s:
            waited_before, began = feed.waited_s, pool.now
        pool.now += step_s
    return (feed.waited_s - waited_before) / (pool.now - began)


def one_of_four_slow(rate: float) -> list[float]:
    fast = rate / 3.25
    return [fast, fast, fast, fast / 4]


@pytest.mark.parametrize("jitter", [0.0, 0.2])
def test_a_slow_worker_that_holds_the_head_does_not_make_the_trainer_wait(jitter: float) -> None:
    pool = Pool(one_of_four_slow(1.2), jitter)
    limit = 24 * REPLY_BYTES
    feed = prefetcher(pool, map(Sample, range(1500)), memory_bytes=limit)
    assert train(pool, feed, until_s=100.0) <= 0.02
    assert pool.most_bytes <= limit
    shallow = Pool(one_of_four_slow(1.2), jitter)
    assert train(shallow, prefetcher(shallow, map(Sample, range(1500)), 4), until_s=100.0) > 0.1


def test_equal_workers_need_a_shallow_depth_only() -> None:
    pool = Pool([0.3] * 4)
    feed = prefetcher(pool, map(Sample, range(1000)))
    assert train(pool, feed, until_s=50.0) <= 0.02
    assert feed.depth <= 6


def test_the_depth_is_given_back_when_the_slow_worker_has_gone() -> None:
    pool = Pool(one_of_four_slow(1.2))
    feed = prefetcher(pool, map(Sample, range(4000)))
    depths = []
    for sample, _ in feed:
        if sample.number == 500:
            pool.speeds = [0.4] * 4
        pool.now += 1.0
        depths.append(feed.depth)
    assert max(depths[:500]) >= 11
    assert depths[-1] <= 6


def test_memory_is_never_above_the_limit_whatever_the_lengths() -> None:
    lengths = random.Random(1)
    samples = [Sample(number, lengths.randint(1, 40)) for number in range(600)]
    limit = reply_to(Sample(0, 100).input_ids).nbytes
    pool = Pool([0.05] * 8, jitter=0.5)
    train(pool, prefetcher(pool, samples, memory_bytes=limit))
    assert limit // 2 < pool.most_bytes <= limit


def test_a_reply_beyond_the_limit_is_asked_for_alone() -> None:
    pool = Pool([1.0] * 4)
    feed = prefetcher(pool, map(Sample, range(20)), memory_bytes=1)
    assert [sample.number for sample, _ in feed] == list(range(20))
    assert pool.most_bytes == REPLY_BYTES


def test_workers_that_cannot_keep_up_are_asked_up_to_the_window_and_no_more() -> None:
    pool = Pool([0.1] * 4, window=16)
    feed = prefetcher(pool, map(Sample, range(400)))
    train(pool, feed)
    assert pool.most_unanswered == 16
    assert feed.depth <= 24  # one growth beyond what the window lets it use


@given(
    speeds=st.lists(st.floats(0.05, 5.0), min_size=1, max_size=5),
    depth=st.one_of(st.just("auto"), st.integers(1, 40)),
    limit=st.integers(1, 30),
    count=st.integers(0, 60),
)
@settings(max_examples=60, deadline=None)
def test_results_come_in_order_at_any_depth(
    speeds: list[float], depth: Any, limit: int, count: int
) -> None:
    pool = Pool(speeds, jitter=0.5)
    feed = prefetcher(pool, map(Sample, range(count)), depth, memory_bytes=limit * REPLY_BYTES)
    seen = []
    for sample, batch in feed:
        assert torch.equal(batch.input_ids, sample.input_ids)
        seen.append(sample.number)
    assert seen == list(range(count))
    if depth == "auto":
        assert pool.most_bytes <= limit * REPLY_BYTES


def test_a_number_is_kept() -> None:
    pool = Pool([0.1] * 4, window=2)
    feed = prefetcher(pool, map(Sample, range(50)), 7, memory_bytes=1)
    for sample, _ in feed:
        assert feed.depth == 7
        assert len(pool._open) == min(7, 49 - sample.number)


def test_leaving_early_cancels_what_is_under_way() -> None:
    pool = Pool([1.0])
    iterator: Iterator[Any] = iter(prefetcher(pool, map(Sample, range(9)), 3))
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert pool.cancelled == 3


@pytest.mark.parametrize(
    ("options", "match"), [({"depth": 0}, "got 0"), ({"memory_bytes": 0}, "0")]
)
def test_settings_out_of_range_are_errors(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Prefetcher(Pool([1.0]), [], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["0", "-1", "deep", "1.5"])
def test_a_prefetch_that_is_neither_auto_nor_a_number_is_wrong_usage(value: str) -> None:
    words = ["train", "--broker", "tcp://127.0.0.1:1", "--data", "d", "--output", "o"]
    done = CliRunner().invoke(cli, [*words, "--prefetch", value])
    assert done.exit_code == 2
    assert "--prefetch" in done.output


def test_a_runs_settings_say_what_prefetch_may_be() -> None:
    with pytest.raises(ValueError, match="'auto' or at least 1, got 0"):
        TrainSettings(data=Path("d"), output=Path("o"), prefetch=0)
    free = [TrainSettings(Path("d"), Path("o"), prefetch=depth).shared() for depth in ("auto", 3)]
    assert free[0] == free[1]  # a resumed run may choose another


# -- the depth alone ------------------------------------------------------------------------------

takes = st.builds(Taken, waited=st.booleans(), lead=st.integers(0, 300), full=st.booleans())


@given(st.lists(takes, max_size=400))
@settings(max_examples=100, deadline=None)
def test_a_depth_stays_in_bounds_and_moves_for_a_reason(events: list[Taken]) -> None:
    auto = AutoDepth()
    before = auto.depth
    for event in events:
        depth = auto.handle(event)
        assert 1 <= depth <= AutoDepth.MOST
        if depth > before:
            assert event.waited
            assert event.full
            assert depth <= before + max(1, before // 2)
        if depth < before:
            assert not event.waited
            assert event.lead >= 2
        before = depth


def test_a_growth_is_judged_before_the_next() -> None:
    auto, wait = AutoDepth(), Taken(waited=True, lead=0, full=True)
    depths = [auto.handle(wait) for _ in range(12)]
    assert depths == [2, 2, 3, 3, 3, 4, 4, 4, 4, 6, 6, 6]


def test_what_lies_ready_for_one_take_is_no_spare() -> None:
    auto = AutoDepth()
    for _ in range(3):
        auto.handle(Taken(waited=True, lead=0, full=True))
    deep = auto.depth
    for _ in range(200):
        auto.handle(Taken(waited=False, lead=1, full=True))
    assert auto.depth == deep > 1
