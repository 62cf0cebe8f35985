"""A run that nobody watches on a terminal says how far it is in its log."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest

from trainer_client.commands.progress import Progress
from trainer_client.training.plan import Plan
from trainer_client.training.ranks import Ranks
from trainer_client.training.trainer import StepMetrics

PLAN = SimpleNamespace(
    total_steps=100,
    coverage=0.9,
    schedule=SimpleNamespace(global_batch=8),
    mapping=SimpleNamespace(draft_vocab_size=64),
    dataset=SimpleNamespace(
        samples=[1], n_tokens=9, truncated=0, without_loss=0, left_out={"not JSON": 3}
    ),
)


def step(number: int) -> StepMetrics:
    return StepMetrics(number, 1.0, [0.5], 2.0, 1e-4, 0.1, 1000.0, 0.25, 1.0)


def lines(caplog: pytest.LogCaptureFixture, rank: int = 0) -> list[dict[str, Any]]:
    """Of a run of 100 steps, one a second."""
    now = [0.0]
    progress = Progress(Ranks(rank, 2), quiet=False, clock=lambda: now[0])
    with caplog.at_level(logging.INFO), progress:
        progress.plan(cast(Plan, PLAN))
        for number in range(1, 101):
            now[0] += 1.0
            progress.step(step(number))
    return [record.fields for record in caplog.records if record.message == "step"]


def test_a_line_every_half_minute_and_at_the_end(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    said = lines(caplog)
    assert [fields["step"] for fields in said] == ["1/100", "31/100", "61/100", "91/100", "100/100"]
    assert [fields["left_s"] for fields in said] == [None, 69, 39, 9, 0]
    assert "3 not JSON" in capsys.readouterr().out.replace("\n", " ")


def test_the_other_ranks_say_nothing(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lines(caplog, rank=1) == []
    assert capsys.readouterr().out == ""
