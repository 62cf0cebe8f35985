"""Waiting for signals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

#: How long a signal can go unnoticed.
_LOOK_S = 0.5


def wait_until(wait: Callable[[float], bool], within_s: float | None = None) -> None:
    """Have the main thread wait until ``wait(timeout_s)`` is true, or so long.

    Never without a timeout: Python runs signal handlers between two instructions of this thread,
    and one that is due just as the thread goes to sleep would run when it wakes. With SIGTERM right
    after SIGHUP, one broker in fifty did not end.
    """
    end = math.inf if within_s is None else time.monotonic() + within_s
    while (left_s := end - time.monotonic()) > 0 and not wait(min(left_s, _LOOK_S)):
        pass
