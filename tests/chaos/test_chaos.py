"""The short form of ``make chaos``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.run import Run


@pytest.mark.heavy
def test_a_draft_trained_through_faults_is_the_draft_of_an_undisturbed_run(tmp_path: Path) -> None:
    run = Run(tmp_path / "chaos", seed=5, steps=100)
    try:
        run.prepare()
        run.chaos(12.0)
        result = run.finish()
    finally:
        run.cluster.close()
    assert result.broken == []
    assert result.weights_identical
    assert sum(result.faults.values()) >= 4
