from __future__ import annotations

import time

import pytest

from broker.signals import wait_until


def test_no_wait_is_without_end() -> None:
    """A signal may come just before each of them."""
    waits: list[float] = []

    def wait(timeout_s: float) -> bool:
        waits.append(timeout_s)
        return len(waits) == 3

    wait_until(wait)
    assert len(waits) == 3
    assert max(waits) <= 1.0


@pytest.mark.parametrize("within_s", [0.0, 0.05])
def test_it_ends_in_time(within_s: float) -> None:
    began = time.monotonic()
    wait_until(lambda timeout_s: bool(time.sleep(timeout_s)), within_s)
    assert within_s <= time.monotonic() - began < 5
