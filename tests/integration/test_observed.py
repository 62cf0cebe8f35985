"""A training run as it can be watched from outside: its processes' metrics, and its trace."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.integration.test_processes import (
    PATIENCE_S,
    STEPS,
    Commands,
    commands,  # noqa: F401 - a fixture
    ends_well,
)
from tests.ports import free_port
from tests.trainer_client.test_trace import assert_nested, spans
from tests.waiting import eventually
from trainer_client.training import metrics


def exposed(address: str, name: str) -> float | None:
    """A metric without labels, or None while nobody answers."""
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
    except (urllib.error.URLError, ConnectionError):
        return None
    return next((float(line.split()[1]) for line in lines if line.startswith(f"{name} ")), None)


@pytest.mark.heavy
def test_every_process_can_be_watched_and_the_run_leaves_a_trace(
    commands: Commands,  # noqa: F811
    tmp_path: Path,
) -> None:
    at_worker, at_trainer = (f"127.0.0.1:{free_port()}" for _ in range(2))
    trace = tmp_path / "traces" / "run.json"
    commands.broker()
    target = ["--target", "embedded", "--threads", 1, "--name", "watched"]
    commands.start("worker", "--broker", commands.workers, *target, "--http", at_worker)
    options = ["--http", at_trainer, "--trace", trace, "--trace-broker", commands.http]
    trainer = commands.start("trainer_client", *commands.training(commands.output), *options)
    eventually(lambda: exposed(at_trainer, "draftmq_trainer_step"), PATIENCE_S)
    assert exposed(at_trainer, "draftmq_trainer_loss") is not None
    ends_well(trainer)

    asked = exposed(commands.http, "draftmq_broker_replies_total")
    assert asked == exposed(at_worker, "draftmq_worker_replies_total")
    assert asked is not None
    assert asked >= STEPS
    last = metrics.read(commands.output / "metrics.jsonl")[-1]
    assert (last["requests"], last["resends"]) == (asked, 0)

    chrome = json.loads(trace.read_text())
    assert_nested(chrome)
    at = spans(chrome)
    ours, broker, worker = sorted(at, key=lambda name: "tbw".index(name[0]))
    assert (ours, worker) == ("trainer rank 0", "worker watched")
    assert {f"step {number}" for number in range(1, STEPS + 1)} <= set(at[ours])
    names = {name for name in at[ours] if name.startswith("generate")}
    assert len(names) == STEPS
    for name in names:
        assert at[ours][name][0] <= at[broker][name][0] <= at[worker][name][0]
        assert at[worker][name][1] <= at[broker][name][1] <= at[ours][name][1]
