from __future__ import annotations

import json
import re

import pytest

from broker.protocol.wish import NAMES
from docs import encodings_table, fp8_table
from worker.supervision.topk import TOP_K

TEXT = encodings_table.PATH.read_text(encoding="utf-8")


def test_the_bytes_are_those_of_real_replies() -> None:
    assert encodings_table._sizes() in TEXT, "run python -m docs.encodings_table"
    assert encodings_table.WISHES[: len(NAMES)] == NAMES


def test_hidden_is_at_most_0_22_of_probs() -> None:
    sizes = {name: encodings_table.bytes_per_token(name) for name in NAMES}
    assert sizes["hidden"] <= 0.22 * sizes["probs"]
    assert sizes["topk"] < sizes["hidden"]


def test_what_topk_loses_is_what_is_written() -> None:
    (row,) = re.findall(rf"\| {TOP_K} \| ([\d.]+) \| ([\d.]+) \|", TEXT)
    assert encodings_table.lost(TOP_K) == pytest.approx([float(each) for each in row], rel=0.1)


def test_what_fp8_costs_is_what_is_written() -> None:
    figures = json.loads(fp8_table.FIGURES.read_text(encoding="utf-8"))
    assert fp8_table.table(figures) in TEXT, "run python -m docs.fp8_table"
    assert len(figures) > 1, "the embedded target has no outliers, and misleads alone"
    now = fp8_table.measure("embedded")["formats"]
    for name, errors in figures["embedded"]["formats"].items():
        assert now[name]["layers"] == pytest.approx(errors["layers"], rel=0.1)
        assert now[name]["overlap"] == pytest.approx(errors["overlap"], abs=0.003)
