"""CUDA tensors within one host, through a ring of a few buffers on the worker's GPU.

The ring is made and mapped once, when the channel is built, so a channel whose ends cannot share
memory is known before a tensor depends on it. The worker copies a part into one buffer while the
client copies the one before out of another; a note on the pair's own connection says which is full,
and which is free again. Both ends copy on streams of their own, of high priority, and wait for
their copies alone: a forward on one side and a training step on the other neither delay a transfer
nor are delayed by it. Nothing of a reply is ever shared, so none of it leaks when an end dies.
"""

from __future__ import annotations

import contextlib
import secrets
import struct
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from broker.protocol.limits import MIB
from worker.direct.backend import WORKER, TransferError, out_of_step, plain
from worker.direct.cudart import HANDLE_BYTES, Region
from worker.direct.pair import OnPair, PairStore
from worker.direct.parts import Piece, parts

#: A buffer takes a part. A hand-over costs 0.3 ms whatever its size (H100), so parts are large; a
#: channel takes ``SLOTS`` buffers of the worker's GPU.
SLOT_BYTES, SLOTS = 32 * MIB, 2
#: How long a thread looks for a copy's end before it sleeps: most have ended then.
_LOOK_S = 0.0002
_TRIAL_BYTES = 16
#: The GPU's UUID, the ring's size, what the ring begins with, and what it is mapped by.
_OFFER = struct.Struct(f"!64sQ{_TRIAL_BYTES}s{HANDLE_BYTES}s")
#: ``(seq, number)`` of a part: the worker's note that it is there, the client's that it is copied.
_NOTE = struct.Struct("!QQ")
#: How long the worker waits for the client to unmap the ring before it frees it.
_UNMAP_S = 2.0


class IpcBackend(OnPair):
    """See :class:`worker.direct.backend.Backend`."""

    def __init__(self, store: PairStore, rank: int, device: torch.device) -> None:
        super().__init__(store)
        self._rank, self._device = rank, device
        self._said = self._heard = 0  # notes of this epoch
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._copied = torch.cuda.Event(blocking=True)  # others spin while they wait
        self._region = self._lend() if rank == WORKER else self._borrow()
        self._ring: Tensor | None = self._region.tensor()
        try:
            self._try_it()
        except BaseException:
            self.close()
            raise

    def send(self, seq: int, tensors: Sequence[Tensor], limit_s: float) -> None:
        cut = parts([tensor.numel() for tensor in tensors], SLOT_BYTES)
        with self._moving():
            for number, part in enumerate(cut):
                if number >= SLOTS:
                    self._hear("copied", seq, number - SLOTS, limit_s)
                with self._copying():
                    for piece, slot in self._laid_out(number, part):
                        slot.copy_(tensors[piece.tensor][piece.start : piece.stop], True)
                self._say("full", seq, number)
            for number in range(max(0, len(cut) - SLOTS), len(cut)):
                self._hear("copied", seq, number, limit_s)

    def receive(self, seq: int, sizes: Sequence[int], limit_s: float) -> list[Tensor]:
        with self._moving():
            with torch.cuda.stream(self._stream):
                taken = [self._empty(size) for size in sizes]
            for number, part in enumerate(parts(sizes, SLOT_BYTES)):
                self._hear("full", seq, number, limit_s)
                with self._copying():
                    for piece, slot in self._laid_out(number, part):
                        taken[piece.tensor][piece.start : piece.stop].copy_(slot, True)
                self._say("copied", seq, number)
        for tensor in taken:  # their memory is of our stream, and they are used on others
            tensor.record_stream(torch.cuda.default_stream(self._device))
        return taken

    def interrupt(self) -> None:
        self._store.interrupt()

    def close(self) -> None:
        self._ring = None
        with contextlib.suppress(TransferError):
            if self._rank == WORKER:  # the client's mapping goes first, or the client has gone
                self._store.leave("unmapped", _UNMAP_S)
            self._region.close()
            if self._rank != WORKER:
                self._store.set("unmapped", "1")
        super().close()

    # -- the ring ---------------------------------------------------------------------------------

    def _lend(self) -> Region:
        region = Region(self._device, SLOTS * SLOT_BYTES)
        try:
            trial = secrets.token_bytes(_TRIAL_BYTES)
            with self._copying():
                region.tensor()[:_TRIAL_BYTES] = torch.tensor(list(trial), dtype=torch.uint8)
            uuid = _uuid(self._device).encode()
            self._store.set("ring", _OFFER.pack(uuid, SLOTS * SLOT_BYTES, trial, region.handle))
        except BaseException:
            region.close()
            raise
        return region

    def _borrow(self) -> Region:
        offer = self._store.get("ring")
        if len(offer) != _OFFER.size:
            raise TransferError(f"the worker offered {len(offer)} bytes, not {_OFFER.size}")
        uuid, nbytes, self._trial, handle = _OFFER.unpack(offer)
        if nbytes != SLOTS * SLOT_BYTES:
            raise TransferError(f"the worker's ring has {nbytes} bytes, not {SLOTS * SLOT_BYTES}")
        return Region(_device_called(uuid.rstrip(b"\0").decode()), nbytes, handle)

    def _try_it(self) -> None:
        """See that both have the same memory: the client reads what the worker wrote."""
        if self._rank == WORKER:
            self._store.wait(["tried"])
            return
        assert self._ring is not None
        read = self._empty(_TRIAL_BYTES)
        with self._copying():
            read.copy_(self._ring[:_TRIAL_BYTES], True)
        if bytes(read.tolist()) != self._trial:
            raise TransferError("the ring that was mapped is not the worker's")
        self._store.set("tried", "1")

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _laid_out(self, number: int, part: Sequence[Piece]) -> Iterator[tuple[Piece, Tensor]]:
        """Each piece of a part with its bytes in the part's buffer, one behind the other."""
        assert self._ring is not None
        start = number % SLOTS * SLOT_BYTES
        for piece in part:
            stop = start + piece.stop - piece.start
            yield piece, self._ring[start:stop]
            start = stop

    # -- copies and notes -------------------------------------------------------------------------

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """Copies on this channel's own stream; they have ended when this has."""
        with torch.cuda.stream(self._stream):
            yield
            self._copied.record(self._stream)
        deadline = time.monotonic() + _LOOK_S
        while not self._copied.query():
            if time.monotonic() >= deadline:
                self._copied.synchronize()
                break

    @contextlib.contextmanager
    def _moving(self) -> Iterator[None]:
        """Whatever fails ends the channel, of which the other end learns at once."""
        try:
            yield
        except (RuntimeError, TransferError) as error:
            self.interrupt()
            if isinstance(error, TransferError):
                raise
            raise TransferError(plain(error)) from error

    def _say(self, what: str, seq: int, number: int) -> None:
        self._store.set(f"{what}/{self._said}", _NOTE.pack(seq, number))
        self._said += 1

    def _hear(self, what: str, seq: int, number: int, limit_s: float) -> None:
        note = self._store.take(f"{what}/{self._heard}", limit_s)
        self._heard += 1
        came = _NOTE.unpack(note) if len(note) == _NOTE.size else ()
        if came != (seq, number):
            raise out_of_step((seq, number), came)


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _device_called(uuid: str) -> torch.device:
    """The GPU of this name, as this process counts them. Raises :class:`TransferError`."""
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        if _uuid(device) == uuid:
            return device
    raise TransferError(
        f"the worker's GPU {uuid} is not visible here; CUDA_VISIBLE_DEVICES must show it to both"
    )
