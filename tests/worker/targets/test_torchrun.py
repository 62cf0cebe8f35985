"""Ranks that torchrun starts again meet each other, not those before them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from tests.waiting import eventually

_PATIENCE_S = 30.0
_RANK = """
from datetime import timedelta
import torch, torch.distributed as dist
from worker.targets.torchrun import join_process_group
join_process_group("gloo", timedelta(seconds=30))
total = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(total)
print(int(total))
"""


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    children: list[subprocess.Popen[str]] = []
    yield children
    for child in children:
        child.kill()


def start(store: dist.TCPStore, rank: int, restarts: int) -> subprocess.Popen[str]:
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(restarts),
    }
    return subprocess.Popen(
        [sys.executable, "-c", _RANK], env=environment, stdout=subprocess.PIPE, text=True
    )


def test_a_rank_that_comes_back_first_waits_for_the_new_other_one(
    started: list[subprocess.Popen[str]],
) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started += [start(store, rank, 0) for rank in range(2)]
    assert [rank.communicate(timeout=_PATIENCE_S)[0] for rank in started] == ["3\n", "3\n"]
    keys = store.num_keys()
    started.append(start(store, 1, 1))
    eventually(lambda: store.num_keys() > keys, _PATIENCE_S)  # its address is one of its own start
    started.append(start(store, 0, 1))
    assert [rank.communicate(timeout=_PATIENCE_S)[0] for rank in started[2:]] == ["3\n", "3\n"]
