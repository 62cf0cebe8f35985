"""CPU tensors within one host, through a few MiB of memory that both ends have mapped.

The worker copies a part into one slot while the client copies the one before out of another; a
note on a local socket says which is full, and which is free again. So a reply of any size takes
the same few pages, which are never new and stay in the caches.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from broker.peer.memory import POOL
from broker.protocol.limits import MIB
from worker.direct.backend import WORKER, TransferError, out_of_step
from worker.direct.pair import OnPair, PairStore
from worker.direct.parts import Piece, on_host, parts
from worker.direct.segment import borrow, lend

#: A slot takes a part. Of 1 to 8 MiB and two to eight slots these were among the fastest and take
#: the least memory, 4 MiB a channel (docs/decisions/0010-shared-memory.md).
SLOT_BYTES, SLOTS = 2 * MIB, 2
#: ``(seq, number)`` of a part: the worker's note that it is there, the client's that it is copied.
_NOTE = struct.Struct("!QQ")


class ShmBackend(OnPair):
    """See :class:`worker.direct.backend.Backend`."""

    def __init__(self, store: PairStore, rank: int) -> None:
        super().__init__(store)
        self._notes, segment = (lend if rank == WORKER else borrow)(store, SLOTS * SLOT_BYTES)
        #: the client's is read-only
        self._slots = np.frombuffer(segment, np.uint8).reshape(SLOTS, SLOT_BYTES)

    def send(self, seq: int, tensors: Sequence[Tensor], limit_s: float) -> None:
        sources = [tensor.numpy() for tensor in on_host(tensors)]
        cut = parts([source.nbytes for source in sources], SLOT_BYTES)
        with self._moving(limit_s):
            for number, part in enumerate(cut):
                if number >= SLOTS:
                    self._hear(seq, number - SLOTS)
                for piece, slot in self._laid_out(number, part):
                    np.copyto(slot, sources[piece.tensor][piece.start : piece.stop])
                self._say(seq, number)
            for number in range(max(0, len(cut) - SLOTS), len(cut)):
                self._hear(seq, number)

    def receive(self, seq: int, sizes: Sequence[int], limit_s: float) -> list[Tensor]:
        taken = [POOL.take(size) for size in sizes]
        with self._moving(limit_s):
            for number, part in enumerate(parts(sizes, SLOT_BYTES)):
                self._hear(seq, number)
                for piece, slot in self._laid_out(number, part):
                    np.copyto(taken[piece.tensor][piece.start : piece.stop], slot)
                self._say(seq, number)
        return [torch.from_numpy(octets) for octets in taken]

    def interrupt(self) -> None:
        with contextlib.suppress(OSError):  # it was closed, or the other end has gone
            self._notes.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        super().close()
        self._notes.close()
        self._slots = np.empty((0, 0), np.uint8)  # lets go of the segment

    def _laid_out(
        self, number: int, part: Sequence[Piece]
    ) -> Iterator[tuple[Piece, NDArray[np.uint8]]]:
        """Each piece of a part with its bytes in the part's slot, one behind the other."""
        slot, start = self._slots[number % SLOTS], 0
        for piece in part:
            stop = start + piece.stop - piece.start
            yield piece, slot[start:stop]
            start = stop

    @contextlib.contextmanager
    def _moving(self, limit_s: float) -> Iterator[None]:
        """Whatever fails ends the channel, of which the other end learns at once."""
        try:
            self._notes.settimeout(limit_s)
            yield
        except (OSError, TransferError) as error:
            self.interrupt()
            if isinstance(error, TransferError):
                raise
            if isinstance(error, TimeoutError):
                raise TransferError(f"timed out: nothing moved for {limit_s:g} s") from error
            raise TransferError(f"the other end is gone: {error.strerror}") from error

    def _say(self, seq: int, number: int) -> None:
        self._notes.send(_NOTE.pack(seq, number))

    def _hear(self, seq: int, number: int) -> None:
        note = self._notes.recv(_NOTE.size)
        if len(note) != _NOTE.size:
            raise TransferError("the other end is gone")
        if (came := _NOTE.unpack(note)) != (seq, number):
            raise out_of_step((seq, number), came)
