"""CUDA IPC and NCCL between two processes, held to what Gloo is held to.

CUDA IPC needs one GPU. NCCL needs two, or NCCL 2.30 with ``NCCL_MULTI_RANK_GPU_ENABLE=1``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from broker.protocol.messages import Invitation
from tests.gpu.peer import LIMIT_S, TRANSFERS, tensors
from worker.direct.backend import Backend, TransferError
from worker.direct.channel import ChannelConfig
from worker.direct.rendezvous import End, join

SIZES = [3 << 20, 0, 17, 300 << 20]


def nccl_devices() -> tuple[str, str]:
    if torch.cuda.device_count() >= 2:
        return "cuda:0", "cuda:1"
    if torch.cuda.nccl.version() >= (2, 30) and "NCCL_MULTI_RANK_GPU_ENABLE" in os.environ:
        return "cuda:0", "cuda:0"
    version = ".".join(map(str, torch.cuda.nccl.version()))
    pytest.skip(f"NCCL {version} needs two GPUs, or 2.30 and NCCL_MULTI_RANK_GPU_ENABLE=1")


def devices(backend: str) -> tuple[str, str]:
    return ("cuda:0", "cuda:0") if backend == "ipc" else nccl_devices()


@contextlib.contextmanager
def channel(backend: str, does: str) -> Iterator[tuple[Backend, subprocess.Popen[str]]]:
    theirs, ours = devices(backend)
    command = [sys.executable, "-m", "tests.gpu.peer", backend, theirs, does, *map(str, SIZES)]
    peer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert peer.stdout is not None
        invited = Invitation(**json.loads(peer.stdout.readline()))
        patience = ChannelConfig(limit_s=LIMIT_S, connect_s=60.0)
        end = End("127.0.0.1", torch.device(ours), patience)
        joined = join(invited, end, threading.Event())
        yield joined, peer
        joined.interrupt()
        joined.close()
    finally:
        peer.kill()
        peer.wait()


@pytest.mark.parametrize("backend", ["ipc", "nccl"])
def test_tensors_arrive_as_they_were(backend: str) -> None:
    with channel(backend, "send") as (end, peer):
        for seq in range(TRANSFERS):
            got = end.receive(seq, SIZES, LIMIT_S)
            expected = tensors(SIZES, seq, got[0].device)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert peer.wait(60) == 0


@pytest.mark.parametrize("backend", ["ipc", "nccl"])
@pytest.mark.parametrize("does", ["die", "stop"])
def test_a_worker_that_dies_or_stops_is_an_error_within_the_limit(backend: str, does: str) -> None:
    with channel(backend, does) as (end, peer):
        end.receive(0, SIZES, LIMIT_S)
        began = time.monotonic()
        with pytest.raises(TransferError):
            end.receive(1, SIZES, LIMIT_S)
        assert time.monotonic() - began < LIMIT_S + 2
        if does == "die":
            assert peer.wait(10) == -signal.SIGKILL
    assert torch.ones(4, device="cuda").sum().item() == 4  # this process's own GPU work goes on
