from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from broker.peer.memory import Pool, _rounded
from broker.protocol.limits import MIB


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_comes_back_when_the_last_view_is_gone() -> None:
    pool = Pool()
    first = pool.take(3 * MIB)
    where = address(first)
    tensor = torch.from_numpy(first)[100:].view(torch.float32)
    del first
    assert address(pool.take(3 * MIB)) != where
    tensor.fill_(1.5)
    assert tensor[-1] == 1.5
    del tensor
    assert address(pool.take(3 * MIB - 5)) == where


def test_two_never_have_the_same_memory() -> None:
    pool = Pool()
    taken = [pool.take(2 * MIB) for _ in range(20)]
    for number, array in enumerate(taken):
        array[:] = number
    assert [int(array[-1]) for array in taken] == list(range(20))


def test_what_is_idle_is_bounded_and_the_oldest_goes() -> None:
    pool = Pool(idle_bytes=5 * MIB)
    taken = [pool.take(2 * MIB) for _ in range(4)]
    newest = address(taken[3])
    while taken:
        taken.pop(0)
    again = pool.take(2 * MIB)
    assert address(again) == newest
    assert pool.held_bytes == 2 * MIB


def test_it_is_used_from_many_threads() -> None:
    pool, failures = Pool(idle_bytes=8 * MIB), []

    def use(number: int) -> None:
        for turn in range(200):
            array = pool.take(MIB + turn % 3)
            array[:16] = number
            if not (array[:16] == number).all():
                failures.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("nbytes", [0, 1, MIB - 1, MIB, MIB + 1, 7 * MIB + 3])
def test_an_array_has_the_bytes_that_were_asked_for(nbytes: int) -> None:
    array = Pool().take(nbytes)
    assert array.shape == (nbytes,)
    assert array.flags.writeable


@given(st.integers(MIB, 1 << 40))
def test_rounding_wastes_at_most_an_eighth(nbytes: int) -> None:
    assert nbytes <= _rounded(nbytes) <= nbytes + nbytes // 8
    assert _rounded(_rounded(nbytes)) == _rounded(nbytes)
