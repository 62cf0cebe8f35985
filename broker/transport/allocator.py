"""How the memory of frames is used again: libzmq takes each frame's from ``malloc``."""

from __future__ import annotations

import functools

from broker.protocol.limits import KIB, MIB

#: The largest block that glibc learns from, less its own book-keeping.
_BLOCK_BYTES = 32 * MIB - 64 * KIB


@functools.cache  # once learned, the block would come from memory that has to be cleared
def adapt_allocator() -> None:
    """Have freed memory kept for the next frames, up to 64 MiB, as in any process that has once
    freed a large array; costs nothing, and does nothing where ``malloc`` is not glibc's.

    At first glibc gives the memory of a large frame back to the system when it is freed, and the
    kernel zeroes the pages of the next one: up to 151,000 page faults for each GiB that passes, and
    a third of the broker's CPU (docs/decisions/0012-replies-in-parts.md). The first free of a large
    block raises its thresholds for good, to that block's size and twice that (mallopt(3),
    ``M_MMAP_THRESHOLD``). Nothing is set, so what the user sets with ``MALLOC_*`` stays as it is.
    """
    bytes(_BLOCK_BYTES)  # mapped and never touched
