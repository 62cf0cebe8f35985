from __future__ import annotations

import platform
import subprocess
import sys

import pytest

#: Page faults of a process that takes, fills and frees eight frames of 2 MiB, twenty times.
_PROGRAM = """
import ctypes, resource, sys
from broker.transport.allocator import adapt_allocator
if sys.argv[1] == "kept":
    adapt_allocator()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
size = 2 << 20
def round_trip():
    frames = [libc.malloc(size) for _ in range(8)]
    for frame in frames:
        ctypes.memset(frame, 1, size)
    for frame in frames:
        libc.free(frame)
round_trip()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    round_trip()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    command = [sys.executable, "-c", _PROGRAM, how]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators do as they like")
def test_the_memory_of_frames_is_kept_for_the_next() -> None:
    returned, kept = faults("returned"), faults("kept")
    assert returned > 20 * 1000  # 16 MiB are 4,096 pages, each time
    assert kept < returned / 100
