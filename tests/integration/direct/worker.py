"""A worker whose direct transfers fail where a test says, as a process.

It serves a stub target whose replies have tens of megabytes. ``--strike`` says at which instant of
which transfer, and ``--how`` what happens there: the process kills or stops itself.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import click
import torch

from worker.direct import gloo, rendezvous, shm
from worker.direct.backend import TransferError
from worker.direct.channel import ChannelConfig
from worker.direct.config import DirectConfig
from worker.direct.parts import parts
from worker.service import Worker
from worker.targets.stub import StubTarget

#: A reply to 4 x 512 tokens: 24 MiB of aux states and 8 MiB of last hidden states.
HIDDEN, BATCH, LENGTH = 1024, 4, 512
LIMIT_S = 3.0
INSTANTS = ("before_send", "mid_send", "after_send", "connecting")


def make_target() -> StubTarget:
    return StubTarget(vocab_size=64, hidden_size=HIDDEN, num_hidden_layers=8)


def patience(limit_s: float = LIMIT_S, backoff_s: float = 0.1) -> ChannelConfig:
    return ChannelConfig(limit_s=limit_s, connect_s=3.0, backoff_s=backoff_s, backoff_max_s=1.0)


def strike_at(instant: str, transfer: int, how: str) -> None:
    """Have this process do ``how`` to itself at that instant, once."""
    done = False

    def reached(seq: int, here: str) -> None:
        nonlocal done
        if not done and (seq, here) == (transfer, instant):
            done = True
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)

    class StruckGloo(gloo.GlooBackend):
        def _send(self, seq: int, tensors: Any, limit: Any) -> None:
            reached(seq, "before_send")
            if (seq, "mid_send") == (transfer, instant):
                self._send_first_part(seq, tensors, limit)
                reached(seq, "mid_send")
                raise TransferError("stopped in mid-send, and continued")
            super()._send(seq, tensors, limit)
            reached(seq, "after_send")

        def _send_first_part(self, seq: int, tensors: Any, limit: Any) -> None:
            """As the backend does it, until the client has the part and waits for the next."""
            posted = [
                self._post_send(tensors[piece.tensor][piece.start : piece.stop])
                for piece in parts([tensor.numel() for tensor in tensors])[0]
            ]
            trailer, ack = torch.tensor([seq, 0]), torch.zeros(2, dtype=torch.int64)
            posted.append(self._post_send(trailer))
            self._post_receive(ack).wait(limit)
            for work in posted:
                work.wait(limit)

    class StruckShm(shm.ShmBackend):
        def send(self, seq: int, tensors: Any, limit_s: float) -> None:
            reached(seq, "before_send")
            super().send(seq, tensors, limit_s)
            reached(seq, "after_send")

        def _hear(self, seq: int, number: int) -> None:
            super()._hear(seq, number)  # the client has this part, and waits for more
            reached(seq, "mid_send")

    def make(*arguments: Any) -> Any:
        reached(transfer, "connecting")
        return original(*arguments)

    original = rendezvous._make
    rendezvous._make = make
    gloo.GlooBackend = StruckGloo  # type: ignore[misc]
    shm.ShmBackend = StruckShm  # type: ignore[misc]


@click.command()
@click.option("--broker", required=True)
@click.option("--name", required=True)
@click.option("--direct", default="auto")
@click.option("--strike", type=click.Choice(INSTANTS))
@click.option("--how", type=click.Choice(("kill", "stop")), default="kill")
@click.option("--transfer", default=2)
@click.option("--advertise", default="")
@click.option("--store-port", default=0)
@click.option("--limit-s", default=LIMIT_S)
@click.option("--backoff-s", default=0.1)
@click.option("--min-bytes", default=DirectConfig.min_bytes)
def main(
    broker: str,
    name: str,
    direct: str,
    strike: str | None,
    how: str,
    transfer: int,
    advertise: str,
    store_port: int,
    limit_s: float,
    backoff_s: float,
    min_bytes: int,
) -> None:
    torch.set_num_threads(1)
    if strike is not None:
        strike_at(strike, transfer, how)
    config = DirectConfig(
        mode=direct,
        advertise=advertise,
        ports=(store_port, store_port),
        min_bytes=min_bytes,
        channel=patience(limit_s, backoff_s),
    )
    with Worker(make_target(), broker, name=name, direct=config) as worker:
        worker.wait()


if __name__ == "__main__":
    main()
