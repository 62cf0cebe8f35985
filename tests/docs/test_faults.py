from __future__ import annotations

from pathlib import Path

import pytest

from docs import faults_table

ROOT = Path(__file__).parents[2]


def test_the_table_of_faults_is_current() -> None:
    text = faults_table.PATH.read_text(encoding="utf-8")
    assert faults_table.render(text) == text, "run python -m docs.faults_table"
    assert len(faults_table.FAULTS) > 24


@pytest.mark.parametrize("fault", faults_table.FAULTS, ids=lambda fault: fault.test)
def test_the_tests_that_are_named_exist(fault: faults_table.Fault) -> None:
    path, _, name = fault.test.partition("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")
