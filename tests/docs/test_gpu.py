from __future__ import annotations

from docs import gpu_table


def test_the_tables_of_what_ran_on_a_gpu_are_current() -> None:
    written = gpu_table.PATH.read_text(encoding="utf-8")
    assert gpu_table.render(written) == written, "run python -m docs.gpu_table"
