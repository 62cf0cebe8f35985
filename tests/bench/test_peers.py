from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from tests.bench.peers.venv import python_of
from tests.bench.ranks import Step, Trained


def test_a_peer_that_cannot_be_installed_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    told: list[str] = []
    for _ in range(2):
        assert python_of(tmp_path / "peer", [], told.append) is None
    assert [text.startswith("installing") for text in told] == [True, False] * 2
    assert "cannot be measured here" in told[1]


def test_a_step_waits_as_long_as_the_rank_that_waits_longest() -> None:
    trained = Trained(
        [
            [Step(0.0, 0.1, 1.0), Step(1.0, 1.3, 2.0)],
            [Step(0.0, 0.2, 1.0), Step(1.0, 1.0, 2.0)],
        ]
    )
    assert trained.steps_per_s == 1.0
    assert math.isclose(trained.waiting, (0.2 + 0.3) / 2)
