"""The programs for a GPU run tiny shapes on a CPU; their figures become rows of the document."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "gpu" / "run.sh"


@pytest.mark.slow
def test_a_run_without_a_gpu_becomes_rows_of_the_document(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    out, kept = tmp_path / "out", tmp_path / "gpu.json"
    subprocess.run([RUN, out, "tests", "channel", "supply", "step"], env=environment, check=True)
    kept.write_text('{"runs": [], "never": []}')
    record = [sys.executable, "-m", "tests.gpu.record", out, "--json", kept]
    subprocess.run(record, check=True, cwd=RUN.parents[2])
    (run,) = json.loads(kept.read_text())["runs"]
    assert {kind for kind, _, _ in run["rows"]} == {"tests", "channel", "supply", "step"}
    assert len(list(out.iterdir())) <= 8
