"""Rows of an engine's own process: all of them, of the right prompt, and nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from tests.waiting import eventually
from worker.targets.vllm.rows import InProcess, RowsReceiver, RowsSender

SHAPES = [(1, 2, 8), (300, 3, 16), (7, 1, 8)]


def states(number: int, dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator().manual_seed(number)
    return torch.randn(SHAPES[number % len(SHAPES)], generator=draw).to(dtype)


def _send(address: str, numbers: list[int], dtype: torch.dtype, stay: bool) -> None:
    sender = RowsSender(address)
    for number in numbers:
        sender.put(str(number), states(number, dtype))
    if stay:
        signal.pause()


def engine(address: str, numbers: list[int], dtype: torch.dtype, *, stay: bool) -> int:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_send, args=(address, numbers, dtype, stay))
    process.start()
    assert process.pid is not None
    return process.pid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_another_process_are_those_of_their_prompts(dtype: torch.dtype) -> None:
    before = sorted(os.listdir("/dev/shm"))
    receiver = RowsReceiver()
    pid = engine(receiver.address, [3, 0, 4, 2, 1], dtype, stay=True)
    made = receiver.take([str(number) for number in range(5)], 20)
    for number, rows in enumerate(made):
        assert rows.dtype == dtype
        assert torch.equal(rows, states(number, dtype))
    rows[...] = 0  # they are ours
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert sorted(os.listdir("/dev/shm")) == before
    receiver.close()


def test_an_engine_that_was_killed_is_said_to_be_gone() -> None:
    told: list[str] = []
    receiver = RowsReceiver(told.append)
    pid = engine(receiver.address, [0], torch.float32, stay=True)
    receiver.take(["0"], 20)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with pytest.raises(RuntimeError, match="states of 1 of 1 prompts are missing: the engine has"):
        receiver.take(["1"], 20)
    eventually(lambda: told)
    receiver.close()


def test_a_receiver_that_is_closed_tells_nobody() -> None:
    told: list[str] = []
    receiver = RowsReceiver(told.append)
    receiver.close()
    assert not told


def test_rows_that_do_not_come_are_not_waited_for_for_ever() -> None:
    receiver = RowsReceiver()
    with pytest.raises(RuntimeError, match=r"of 2 of 2 prompts are missing: .* within 0.05 s"):
        receiver.take(["0", "1"], 0.05)
    receiver.close()


def test_in_one_process_nothing_is_copied() -> None:
    sender, receiver = RowsSender(""), InProcess()
    sent = states(0, torch.float32)
    sender.put("a", sent)
    assert receiver.take(["a"], 0)[0].data_ptr() == sent.data_ptr()
    with pytest.raises(RuntimeError, match="of 1 of 1 prompts are missing"):
        receiver.take(["a"], 0)


def test_no_descriptor_is_left_open() -> None:
    receiver = RowsReceiver()
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    pid = engine(receiver.address, list(range(50)), torch.float32, stay=False)
    made = receiver.take([str(number) for number in range(50)], 20)
    os.waitpid(pid, 0)
    eventually(lambda: receiver.gone)
    assert len(made) == 50
    # the process that was started has some of its own
    assert len(list(Path("/proc/self/fd").iterdir())) < open_before + 10
    receiver.close()
