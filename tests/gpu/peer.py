"""The worker's end of a channel, in a process of its own: ``... peer BACKEND DEVICE DOES SIZES``.

It prints its invitation as JSON, then sends what the test expects. ``DOES`` is ``send``, or
``die`` or ``stop`` in place of the second transfer.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import asdict

import torch

from tests.worker.direct.pairs import invitation
from worker.direct.channel import ChannelConfig
from worker.direct.rendezvous import End, Rendezvous

LIMIT_S = 5.0
TRANSFERS = 3


def tensors(sizes: list[int], seq: int, device: torch.device) -> list[torch.Tensor]:
    """What transfer ``seq`` has: uint8, and different each time."""
    draw = torch.Generator().manual_seed(seq)
    return [
        torch.randint(0, 256, (size,), dtype=torch.uint8, generator=draw).to(device)
        for size in sizes
    ]


def main(backend: str, device_name: str, does: str, *sizes: str) -> None:
    device = torch.device(device_name)
    rendezvous = Rendezvous("127.0.0.1", (0, 0))
    invited = invitation(rendezvous, backend)
    print(json.dumps(asdict(invited)), flush=True)
    patience = ChannelConfig(limit_s=LIMIT_S, connect_s=60.0)
    end = rendezvous.meet(invited, End("127.0.0.1", device, patience), threading.Event())
    for seq in range(TRANSFERS):
        if seq == 1 and does != "send":
            os.kill(os.getpid(), signal.SIGKILL if does == "die" else signal.SIGSTOP)
        end.send(seq, tensors(list(map(int, sizes)), seq, device), LIMIT_S)
    end.close()
    rendezvous.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
