"""How glibc treats the memory of frames, in a process that is a broker and nothing else."""

from __future__ import annotations

import contextlib
import ctypes

from broker.protocol.limits import MIB

#: ``mallopt``'s names for them, from ``malloc.h``.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: More than the frames of a few parts. What is freed beyond it goes back to the system.
_KEPT_BYTES = 64 * MIB
#: The most that glibc takes here: larger frames are mapped, and unmapped when they are freed.
_MAPPED_BYTES = 32 * MIB


def keep_memory() -> bool:
    """Have freed memory kept for the next frame, up to 64 MiB; False where this is not glibc.

    Else glibc gives the memory of each frame back to the system when the frame has passed, and the
    kernel zeroes the pages of the next one: up to 97,000 page faults for each GiB that passes, and
    a third of the broker's CPU (docs/decisions/0012-replies-in-parts.md).
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - raises where there is another libc
        kept = libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        return bool(kept and libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES))
    return False
