"""The benchmarks run, and say what they found in the promised form. No figure is judged here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.bench.__main__ import PARTS, main
from tests.bench.lines import Line
from tests.bench.report import draw, write_json

_FIELDS = {"value", "unit", "wants", "holds", "peer", "peer_value"}


@pytest.mark.heavy
@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_and_says_figures(part: str, tmp_path: Path) -> None:
    arguments = ["--quick", "--only", part, "--output", str(tmp_path)]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "bench.json").read_text())
    assert set(said) == {"machine", "lines"}
    assert said["machine"]["cores"] > 0
    assert said["lines"]
    for line in said["lines"].values():
        assert set(line) == _FIELDS
        assert math.isfinite(line["value"])
        assert isinstance(line["holds"], bool)
        assert isinstance(line["unit"], str)
        assert isinstance(line["wants"], str)
        assert line["peer_value"] is None or line["peer"]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_two_parts_are_in_one_file(tmp_path: Path) -> None:
    lines = [
        Line("faster", 2.0, "GiB/s", ">= 1", True, "peer", 0.5),
        Line("slower", 9.0, "ms", "<= 1", False),
    ]
    write_json(tmp_path / "bench.json", lines)
    said = json.loads((tmp_path / "bench.json").read_text())["lines"]
    assert said["faster"]["peer_value"] == 0.5
    assert said["slower"] == {
        "value": 9.0,
        "unit": "ms",
        "wants": "<= 1",
        "holds": False,
        "peer": None,
        "peer_value": None,
    }
    draw(tmp_path / "bench.png", {"x": lines[:1], "y": lines[1:]})
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_an_unknown_part_is_said() -> None:
    done = CliRunner().invoke(main, ["--only", "a,z"])
    assert done.exit_code == 2
    assert "no part z" in done.output
