"""``python -m tests.hosts.wire DEVICE DELAY_S LOSS``: a bad line, for kernels without netem.

Reads the packets that are routed into a TUN device, and writes them back later; a share is lost.
Chance comes from a seed, so the same packets of a run are lost each time.
"""

from __future__ import annotations

import collections
import fcntl
import os
import random
import select
import struct
import sys
import time

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_MOST_BYTES = 65536


def main(device: str, delay_s: float, loss: float) -> None:
    """Until it is killed."""
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = _IFF_TUN | _IFF_NO_PI
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", device.encode(), flags))
    chance = random.Random(0)
    waiting: collections.deque[tuple[float, bytes]] = collections.deque()
    while True:
        wait_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        if select.select([tun], [], [], wait_s)[0]:
            packet = os.read(tun, _MOST_BYTES)
            if chance.random() >= loss:
                waiting.append((time.monotonic() + delay_s, packet))
        while waiting and waiting[0][0] <= time.monotonic():
            os.write(tun, waiting.popleft()[1])


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]))
