"""CPU tensors over TCP, by a Gloo process group of two that stands beside any other group.

What Gloo does when a peer dies decides the shape of a transfer. A receive whose sender dies within
the payload ends only at its own timeout, but one behind it ends at once: so each part is followed
by a trailer, and the trailer is what is waited for. The sender likewise waits for
acknowledgements. A wait that times out closes the whole group, which the peer notices: that is how
the other end learns of a failure, and how a waiter is freed (``abort`` frees none).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo

from broker.peer.memory import POOL
from worker.direct.backend import CLIENT, WORKER, TransferError, out_of_step, plain
from worker.direct.pair import OnPair, PairStore
from worker.direct.parts import on_host, parts

#: Tags of transfers go round below this one, which is never sent: a receive on it must time out.
_NEVER = 1 << 30
_SOON = timedelta(milliseconds=1)


class GlooBackend(OnPair):
    """See :class:`worker.direct.backend.Backend`."""

    def __init__(self, store: PairStore, rank: int, address: str, limit_s: float) -> None:
        super().__init__(store)
        self._peer = CLIENT if rank == WORKER else WORKER
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=limit_s)
        # an address, for a hostname's lookup would choose the interface
        options._devices = [ProcessGroupGloo.create_device(hostname=address)]
        options._threads = 1
        try:
            self._group: Any = ProcessGroupGloo(store, rank, 2, options)
        except RuntimeError as error:
            raise TransferError(plain(error)) from error
        self._tag = 0  # every message of an epoch has its own, counted alike at both ends

    def send(self, seq: int, tensors: Sequence[Tensor], limit_s: float) -> None:
        try:
            self._send(seq, on_host(tensors), timedelta(seconds=limit_s))
        except (RuntimeError, TransferError) as error:
            self.interrupt()  # before the buffers go out of scope
            raise TransferError(plain(error)) from error

    def receive(self, seq: int, sizes: Sequence[int], limit_s: float) -> list[Tensor]:
        tensors = [torch.from_numpy(POOL.take(size)) for size in sizes]
        try:
            self._receive(seq, tensors, timedelta(seconds=limit_s))
        except (RuntimeError, TransferError) as error:
            self.interrupt()
            raise TransferError(plain(error)) from error
        return tensors

    def _send(self, seq: int, tensors: Sequence[Tensor], limit: timedelta) -> None:
        posted, acks = [], []
        for number, part in enumerate(parts([tensor.numel() for tensor in tensors])):
            for piece in part:
                posted.append(self._post_send(tensors[piece.tensor][piece.start : piece.stop]))
            posted.append(self._post_send(torch.tensor([seq, number])))
            ack = torch.zeros(2, dtype=torch.int64)
            acks.append((ack, self._post_receive(ack)))
        for number, (ack, work) in enumerate(acks):
            work.wait(limit)
            _check(ack, seq, number)
        for work in posted:
            work.wait(limit)

    def _receive(self, seq: int, tensors: Sequence[Tensor], limit: timedelta) -> None:
        expected = []
        for part in parts([tensor.numel() for tensor in tensors]):
            pieces = [
                self._post_receive(tensors[piece.tensor][piece.start : piece.stop])
                for piece in part
            ]
            trailer = torch.zeros(2, dtype=torch.int64)
            expected.append((trailer, self._post_receive(trailer), pieces, self._next_tag()))
        for number, (trailer, work, pieces, ack_tag) in enumerate(expected):
            work.wait(limit)
            _check(trailer, seq, number)
            for piece in pieces:
                piece.wait(limit)
            self._group.send([trailer], self._peer, ack_tag).wait(limit)

    def _post_send(self, tensor: Tensor) -> Any:
        return self._group.send([tensor], self._peer, self._next_tag())

    def _post_receive(self, tensor: Tensor) -> Any:
        return self._group.recv([tensor], self._peer, self._next_tag())

    def _next_tag(self) -> int:
        self._tag = (self._tag + 1) % _NEVER
        return self._tag

    def interrupt(self) -> None:
        with contextlib.suppress(RuntimeError):  # the timeout, or it was closed before
            self._group.recv([torch.zeros(1)], self._peer, _NEVER).wait(_SOON)


def _check(note: Tensor, seq: int, number: int) -> None:
    if note.tolist() != [seq, number]:
        raise out_of_step((seq, number), tuple(note.tolist()))
