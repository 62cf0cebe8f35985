"""What a run shows of itself: curves that are renewed, and means that follow noisy values."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.figure
import pytest

from trainer_client.training.metrics import draw_curves, smoothed


def test_a_mean_follows_the_values_and_passes_by_what_is_none() -> None:
    assert smoothed([None, 4.0, 2.0, None, 3.0])[1:] == pytest.approx([4.0, 3.0, 3.0, 3.0])
    assert math.isnan(smoothed([None, 4.0])[0])
    noisy = smoothed([1.0 + (-1) ** n for n in range(400)])
    assert abs(noisy[-1] - 1.0) < 0.05


def test_curves_say_whose_they_are_and_take_the_place_of_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    write = matplotlib.figure.Figure.suptitle
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "suptitle",
        lambda self, text, **options: titles.append(text) or write(self, text, **options),
    )
    line = {"loss": None, "depth_accuracy": [0.5], "accept_length": 1.5, "waiting_share": 0.1}
    lines = [line | {"step": 1}, line | {"step": 2, "loss": 3.0}]
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    draw_curves(lines, path, "one: draft of tiny, step 2 of 9")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert titles == ["one: draft of tiny, step 2 of 9"]
    assert [each.name for each in tmp_path.iterdir()] == ["curves.png"]
