"""Training through the broker gives the draft that co-located training gives, bit for bit."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.conftest import VOCAB, Cluster, make_target
from tests.waiting import eventually
from trainer_client.drafts.export import read_draft
from trainer_client.targets.batch import TargetBackend
from trainer_client.targets.colocated import ColocatedTarget
from trainer_client.training import metrics
from trainer_client.training.run import train
from trainer_client.training.settings import TrainSettings
from trainer_client.training.trainer import StepMetrics
from worker.direct.config import DirectConfig


class ByteTokenizer:
    """Tokens are bytes."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [byte % VOCAB for byte in text.encode()]}


def settings(tmp_path: Path, name: str, **changes: Any) -> TrainSettings:
    data = tmp_path / "data.txt"
    numbers = random.Random(0)
    data.write_text(" ".join(f"{numbers.random():.6f} is a number." for _ in range(600)))
    values: dict[str, Any] = {
        "data": data,
        "output": tmp_path / name,
        "max_steps": 50,
        "batch_size": 2,
        "max_length": 24,
        "draft_vocab_size": 64,
        "learning_rate": 3e-3,
        "ttt_depths": 3,
        "checkpoint_every": 20,
    }
    return TrainSettings(**(values | changes))


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in metrics.read(output / "metrics.jsonl")]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return read_draft(output / "draft").state_dict()


def run(backend: TargetBackend, wanted: TrainSettings, **options: Any) -> Path:
    train(wanted, backend, ByteTokenizer(), **options)
    return wanted.output


def assert_same(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    expected = weights(one)
    for name, tensor in weights(other).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture
def colocated(tmp_path: Path) -> Path:
    """A run with the target in this process."""
    return run(ColocatedTarget(make_target(), "probs"), settings(tmp_path, "colocated"))


def test_probs_through_two_workers_are_bit_identical(
    cluster: Cluster, tmp_path: Path, colocated: Path
) -> None:
    for _ in range(2):
        cluster.worker(make_target())
    through = run(cluster.trainer(encoding="probs"), settings(tmp_path, "through"))
    assert len(losses(through)) == 50
    assert losses(through)[-1] < losses(through)[0]
    assert_same(colocated, through)
    assert all(w["answered"] for w in cluster.broker.snapshot()["workers"])


@pytest.mark.parametrize(("encoding", "prefetch"), [("hidden", "auto"), ("topk", 1), ("probs", 9)])
def test_any_encoding_at_any_depth_has_the_bits_of_the_same_colocated(
    cluster: Cluster, tmp_path: Path, encoding: str, prefetch: Any
) -> None:
    alone = settings(tmp_path, "alone", max_steps=12)
    run(ColocatedTarget(make_target(), encoding), alone)
    cluster.worker(make_target())
    wanted = settings(tmp_path, "through", max_steps=12, prefetch=prefetch)
    assert_same(alone.output, run(cluster.trainer(encoding=encoding), wanted))


def test_hidden_gives_the_same_losses_to_1e_4(
    cluster: Cluster, tmp_path: Path, colocated: Path
) -> None:
    cluster.worker()
    through = run(cluster.trainer(encoding="auto"), settings(tmp_path, "through"))
    assert losses(through) == pytest.approx(losses(colocated), abs=1e-4)


@pytest.mark.parametrize("backend", ["gloo", "shm"])
def test_direct_transfers_are_bit_identical_to_the_wire(
    cluster: Cluster, tmp_path: Path, colocated: Path, backend: str
) -> None:
    direct = DirectConfig(mode=backend, min_bytes=1)
    for _ in range(2):
        cluster.worker(make_target(), direct=direct)
    remote = cluster.trainer(encoding="probs", direct=direct)
    assert_same(colocated, run(remote, settings(tmp_path, "direct")))
    wire = cluster.trainer(encoding="probs", direct="off")
    assert_same(tmp_path / "direct", run(wire, settings(tmp_path, "wire")))
    assert remote.counters()["direct"] > 25
    assert wire.counters()["direct"] == 0


def test_full_logits_give_the_losses_of_probs(tmp_path: Path, colocated: Path) -> None:
    logits = run(ColocatedTarget(make_target(), "logits"), settings(tmp_path, "logits"))
    assert losses(logits) == losses(colocated)


class At:
    """Calls something once a run has come to a step."""

    def __init__(self, **calls: Callable[[], object]) -> None:
        self._calls = {int(name.removeprefix("step")): call for name, call in calls.items()}

    def __call__(self, step: StepMetrics) -> None:
        if call := self._calls.pop(step.step, None):
            call()


def test_workers_that_come_and_drain_in_mid_run_change_nothing(
    cluster: Cluster, tmp_path: Path, colocated: Path
) -> None:
    first = cluster.worker(make_target(), name="first")
    cluster.worker(make_target(), name="second")
    plan = At(
        step10=lambda: cluster.worker(make_target(), name="third"),
        step20=lambda: first.drain("SIGTERM"),
    )
    through = run(cluster.trainer(encoding="probs"), settings(tmp_path, "through"), on_step=plan)
    assert_same(colocated, through)
    assert first.wait(10)
    eventually(lambda: len(cluster.broker.snapshot()["workers"]) == 2)
    seen = {w["worker"]: w["answered"] for w in cluster.broker.snapshot()["workers"]}
    assert set(seen) == {"second", "third"}
    assert seen["third"] > 0
    assert cluster.broker.snapshot()["counters"]["requeues"] == 0


def test_a_worker_that_vanishes_in_mid_run_changes_nothing(
    cluster: Cluster, tmp_path: Path, colocated: Path
) -> None:
    first = cluster.worker(make_target())
    cluster.worker(make_target())
    through = run(
        cluster.trainer(encoding="probs"),
        settings(tmp_path, "through"),
        on_step=At(step15=first.stop),
    )
    assert_same(colocated, through)


def test_a_broker_restarted_in_mid_run_changes_nothing(
    cluster: Cluster, tmp_path: Path, colocated: Path
) -> None:
    for _ in range(2):
        cluster.worker(make_target())
    old = cluster.broker
    ends = old.client_endpoint, old.worker_endpoint

    def restart() -> None:
        old.stop()
        cluster.broker = cluster.start_broker(*ends)

    through = run(
        cluster.trainer(encoding="probs"),
        settings(tmp_path, "through"),
        on_step=At(step15=restart),
    )
    assert_same(colocated, through)
    assert cluster.broker.snapshot()["counters"]["replies"] > 20


def test_requests_go_on_with_another_broker_when_one_stops(
    cluster: Cluster, tmp_path: Path, colocated: Path
) -> None:
    from trainer_client.targets.remote import RemoteEagle3TargetModel

    other = cluster.start_broker()
    cluster.worker(make_target())
    spare = cluster.broker
    cluster.broker = other
    cluster.worker(make_target())
    urls = [spare.client_endpoint, other.client_endpoint]
    with RemoteEagle3TargetModel.from_urls(urls, device="cpu", timeout=30) as remote:
        through = run(remote, settings(tmp_path, "through"), on_step=At(step15=other.stop))
    assert_same(colocated, through)


class Interrupted(Exception):  # noqa: N818 - it is no error
    pass


def test_a_resumed_run_has_the_bits_of_one_without_a_pause(tmp_path: Path, colocated: Path) -> None:
    def interrupt() -> None:
        raise Interrupted

    wanted = settings(tmp_path, "resumed")
    with pytest.raises(Interrupted):
        run(ColocatedTarget(make_target(), "probs"), wanted, on_step=At(step33=interrupt))
    assert len(losses(wanted.output)) == 33
    again = settings(tmp_path, "resumed", resume=True)
    assert_same(colocated, run(ColocatedTarget(make_target(), "probs"), again))
    assert losses(wanted.output) == losses(colocated)


def test_every_sample_of_an_epoch_is_asked_for_once(tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []
    target = ColocatedTarget(make_target(), "probs")
    ask = target.generate_batch

    def generate_batch(input_ids: torch.Tensor, *masks: torch.Tensor) -> Any:
        seen.extend(tuple(row.tolist()) for row in input_ids)
        return ask(input_ids, *masks)

    target.generate_batch = generate_batch  # type: ignore[method-assign]
    wanted = settings(tmp_path, "epoch", max_steps=0)
    summary = train(wanted, target, ByteTokenizer())
    assert len(seen) == len(set(seen)) == summary["samples"]


def test_two_trainers_share_the_workers(cluster: Cluster, tmp_path: Path, colocated: Path) -> None:
    for _ in range(2):
        cluster.worker(make_target())
    remotes = [cluster.trainer(encoding="probs") for _ in range(2)]
    outputs: Iterator[Path] = iter([tmp_path / "one", tmp_path / "two"])
    wanted = [settings(tmp_path, next(outputs).name) for _ in remotes]
    threads = [
        threading.Thread(target=run, args=pair) for pair in zip(remotes, wanted, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in wanted:
        # two torch threads share a generator, so the drafts begin differently; all else is equal
        assert len(losses(one.output)) == 50
