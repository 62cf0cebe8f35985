"""Replays what fuzzing found, and its seeds; needs no fuzzer."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.fuzz.targets import MAX_BYTES, TARGETS

HERE = Path(__file__).parent
#: Far above what any input takes, far below a hang.
LIMIT_S = 5.0


@pytest.mark.parametrize("name", TARGETS)
def test_every_input_ends_in_a_value_or_in_our_own_error(name: str) -> None:
    target = TARGETS[name]
    kept = sorted((HERE / "corpus" / name).glob("*"))
    found = sorted((HERE / "crashes" / name).glob("*"))
    inputs = [*target.seeds, b"", b"\0" * MAX_BYTES, *(path.read_bytes() for path in kept + found)]
    for data in inputs:
        began = time.monotonic()
        target.run(data)
        assert time.monotonic() - began < LIMIT_S, data[:200]


def test_every_kept_input_belongs_to_a_target() -> None:
    for folder in (HERE / "corpus", HERE / "crashes"):
        assert {path.name for path in folder.iterdir() if path.is_dir()} <= set(TARGETS)
