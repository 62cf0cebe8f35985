"""A process whose clock is behind takes its name over from the one before it all the same."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest

from tests.integration.conftest import Cluster, tokens
from tests.waiting import eventually
from trainer_client.errors import TrainerClientError
from worker.errors import WorkerError
from worker.supervision.mapping import VocabMapping

_HOUR_S = 3600.0


@pytest.fixture
def an_hour_behind(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the wall clock of this process back; a function to be called in mid-test."""
    now, now_ns = time.time, time.time_ns

    def set_back() -> None:
        monkeypatch.setattr(time, "time", lambda: now() - _HOUR_S)
        monkeypatch.setattr(time, "time_ns", lambda: now_ns() - int(_HOUR_S * 1e9))

    return set_back


def test_a_restarted_worker_with_a_clock_behind_serves_and_the_old_one_does_not(
    cluster: Cluster, mapping: VocabMapping, an_hour_behind: Any
) -> None:
    old = cluster.worker(name="w")
    eventually(lambda: not old.trouble)
    an_hour_behind()
    new = cluster.worker(name="w")
    with pytest.raises(WorkerError, match="fenced off"):
        old.wait(10)
    remote = cluster.trainer(mapping)
    assert remote.generate_batch(*tokens()) is not None
    assert new.measures.replies > 0
    assert old.measures.replies == 0
    assert not new.trouble


def test_a_restarted_client_with_a_clock_behind_is_served_and_the_old_one_refused(
    cluster: Cluster, mapping: VocabMapping, an_hour_behind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.worker()
    old = cluster.trainer(mapping, name="rank0")
    old.generate_batch(*tokens())
    an_hour_behind()
    new = cluster.trainer(mapping, name="rank0")
    with caplog.at_level(logging.ERROR):
        new.generate_batch(*tokens(1))
        with pytest.raises(TrainerClientError, match="fenced off"):
            old.generate_batch(*tokens(2))
    new.generate_batch(*tokens(3))
