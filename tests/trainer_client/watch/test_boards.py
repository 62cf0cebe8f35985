"""Figures on TensorBoard and Weights & Biases, offline, and what happens where they fail."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer_client.errors import TrainerClientError
from trainer_client.training.settings import TrainSettings
from trainer_client.watch import boards
from trainer_client.watch.boards import opened, write

LINE = {"step": 7, "loss": 1.5, "depth_accuracy": [0.5, 0.25], "left_out": (), "name": "x"}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        name: [(each.step, each.value) for each in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_has_every_number_of_a_line(tmp_path: Path) -> None:
    with opened(["tensorboard"], tmp_path, 6, {"learning_rate": 1e-4}) as there:
        write(there, 7, LINE)
        write(there, 8, LINE | {"loss": 1.25})
        write(there, 8, {"loss": 2.0}, "validation/")
    seen = scalars(tmp_path)
    assert seen["loss"] == [(7, 1.5), (8, 1.25)]
    assert seen["depth_accuracy/1"] == [(7, 0.25), (8, 0.25)]
    assert seen["validation/loss"] == [(8, 2.0)]
    assert set(seen) == {"loss", "depth_accuracy/0", "depth_accuracy/1", "validation/loss"}


def test_a_resumed_run_takes_the_place_of_what_it_trains_again(tmp_path: Path) -> None:
    with opened(["tensorboard"], tmp_path, 0, {}) as there:
        for step in range(1, 6):
            write(there, step, {"loss": 10.0 + step})
    with opened(["tensorboard"], tmp_path, 3, {}) as there:
        write(there, 4, {"loss": 4.0})
    assert scalars(tmp_path)["loss"] == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 4.0)]


def test_weights_and_biases_runs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with opened(["wandb"], tmp_path, 0, {"seed": 0}) as there:
        write(there, 1, LINE)
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert kept.stat().st_size > 0


@pytest.mark.parametrize("name", boards.BOARDS)
def test_a_package_that_is_missing_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with (
        pytest.raises(TrainerClientError, match=rf"pip install 'draftmq\[{name}\]'"),
        opened([name], tmp_path, 0, {}),
    ):
        pass


def test_a_board_that_fails_costs_a_warning_and_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def write(self, step: int, values: Any) -> None:
            raise OSError("no room left")

        def close(self) -> None:
            raise OSError("no room left")

    caplog.set_level(logging.WARNING, "draftmq.train")
    with opened([], tmp_path, 0, {}) as there:
        there.append(Broken())
        write(there, 1, LINE)
    said = [record.fields["error"] for record in caplog.records]  # type: ignore[attr-defined]
    assert said == ["OSError: no room left"] * 2


def test_a_board_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="log_to knows tensorboard and wandb, got tensorbord"):
        TrainSettings(data=tmp_path, output=tmp_path, log_to="tensorbord")
