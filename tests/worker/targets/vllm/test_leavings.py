"""What a killed engine's processes shared by name is taken away, and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.waiting import eventually
from worker.targets.vllm.leavings import remove, shared_by_children


@pytest.fixture
def names() -> Iterator[tuple[Path, Path]]:
    made = tuple(Path("/dev/shm", f"draftmq-test-{uuid.uuid4().hex}") for _ in range(2))
    yield made[0], made[1]
    for path in made:
        path.unlink(missing_ok=True)


def _share(path: str) -> None:
    tensor = torch.from_file(path, shared=True, size=64)
    tensor.fill_(1)
    signal.pause()


def test_only_what_a_child_has_mapped_is_removed(names: tuple[Path, Path]) -> None:
    childs, other = names
    other.write_text("of somebody else")
    process = multiprocessing.get_context("fork").Process(target=_share, args=(str(childs),))
    process.start()
    eventually(lambda: str(childs) in shared_by_children())
    shared = shared_by_children()
    assert str(other) not in shared
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert childs.exists()  # nobody else takes it away
    remove(shared)
    assert not childs.exists()
    assert other.exists()
