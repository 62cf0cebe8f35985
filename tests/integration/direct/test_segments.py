"""What shared memory holds, and when it is free again, as the kernel shows it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from pathlib import Path

import pytest

from tests.integration.conftest import Cluster
from tests.integration.direct.conftest import Scene
from tests.integration.direct.test_transfers import until_direct
from tests.waiting import eventually
from worker.direct import segment
from worker.direct.channel import ChannelConfig
from worker.direct.config import DirectConfig
from worker.direct.shm import SLOT_BYTES, SLOTS
from worker.supervision.mapping import VocabMapping


@pytest.fixture
def backend() -> str:
    return "shm"


def mapped(process: int | str) -> dict[int, int]:
    """The bytes of each segment that a process has mapped, by inode (proc(5): maps)."""
    found = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        for line in Path(f"/proc/{process}/maps").read_text().splitlines():
            if "memfd:draftmq" in line:
                ends, _, _, _, inode, *_ = line.split()
                first, _, last = ends.partition("-")
                found[int(inode)] = int(last, 16) - int(first, 16)
    return found


def opened(process: int | str) -> int:
    """How many descriptors of segments a process has."""
    count = 0
    for entry in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since
            count += "memfd:draftmq" in os.readlink(entry)
    return count


def test_a_channel_holds_one_small_segment_whatever_it_moves(scene: Scene) -> None:
    worker = scene.worker("worker", "--backoff-s", 0.01)
    trainer = scene.trainer()
    for _ in range(5):
        trainer.until_direct(3)  # replies of 32 MiB
        held = mapped("self")
        assert list(held.values()) == [SLOTS * SLOT_BYTES]
        assert mapped(worker.pid) == held
        scene.cut()
        trainer.until_failed()


def test_a_segment_is_free_when_the_worker_is_killed(scene: Scene) -> None:
    doomed = scene.worker("doomed", "--strike", "mid_send")
    trainer = scene.trainer()
    trainer.until_direct(1)
    (lent,) = mapped("self")
    scene.worker("heir")
    trainer.until_ended(doomed)
    assert doomed.returncode == -signal.SIGKILL
    trainer.until_direct()
    assert lent not in mapped("self")
    assert opened("self") == 1  # the heir's


def test_a_segment_is_free_when_the_client_is_killed(scene: Scene) -> None:
    worker = scene.worker("worker")
    victim = scene.trainer_process("victim", "--strike")
    eventually(lambda: mapped(worker.pid))
    assert victim.wait(60) == -signal.SIGKILL
    eventually(lambda: not mapped(worker.pid))
    assert opened(worker.pid) == 0


def none(*_: object) -> bool:
    return False


def no_memory(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("owner", "name", "instead"),
    [(segment, "_is_ours", none), (os, "posix_fallocate", no_memory)],
    ids=["another user", "no memory"],
)
def test_what_shared_memory_cannot_do_gloo_does(
    cluster: Cluster,
    mapping: VocabMapping,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    instead: object,
) -> None:
    monkeypatch.setattr(owner, name, instead)
    direct = DirectConfig(min_bytes=1, channel=ChannelConfig(backoff_s=0.01, connect_s=2.0))
    worker = cluster.worker(direct=direct)
    assert worker._sender.choice.backends == ("shm", "gloo")
    remote = cluster.trainer(mapping, direct=direct)
    until_direct(remote)
    (peer,) = worker._sender._peers.values()
    assert peer.backends == ["gloo"]
    assert remote.counters()["failures"] == 0
    assert not mapped("self")
