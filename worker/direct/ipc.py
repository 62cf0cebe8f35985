"""CUDA tensors within one host: the receiver maps the sender's memory and copies out of it.

The sender tells the memory handle on the channel's own connection and keeps the tensor until the
receiver has copied and said so. A handle is rebuilt from plain fields that are checked one by one;
nothing is unpickled.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import msgpack
import torch
from torch import Tensor

from worker.direct.backend import TransferError
from worker.direct.pair import OnPair, PairStore

_POLL_S = 0.0005
#: Types of the fields that stand for one tensor's memory, in order.
_FIELDS = (str, int, bytes, int, int, bytes, int, bytes, bool)


class IpcBackend(OnPair):
    """See :class:`worker.direct.backend.Backend`."""

    def __init__(self, store: PairStore, device: torch.device) -> None:
        super().__init__(store)
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._interrupted = threading.Event()

    def send(self, seq: int, tensors: Sequence[Tensor], limit_s: float) -> None:
        kept = [tensor.to(self._device) for tensor in tensors]
        handles = [_handle(tensor) for tensor in kept if tensor.numel()]
        self._store.set(f"tensors/{seq}", msgpack.packb(handles))
        self._wait_for(f"copied/{seq}", limit_s)
        self._store.delete_key(f"tensors/{seq}")
        self._store.delete_key(f"copied/{seq}")

    def receive(self, seq: int, sizes: Sequence[int], limit_s: float) -> list[Tensor]:
        self._wait_for(f"tensors/{seq}", limit_s)
        handles = _checked(self._store.get(f"tensors/{seq}"), sum(size > 0 for size in sizes))
        with torch.cuda.stream(self._stream):
            tensors = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]
            filled = [tensor for tensor in tensors if tensor.numel()]
            mapped = [_map(handle, t.numel()) for handle, t in zip(handles, filled, strict=True)]
            for tensor, source in zip(filled, mapped, strict=True):
                tensor.copy_(source, non_blocking=True)
        self._stream.synchronize()
        del mapped
        self._store.set(f"copied/{seq}", "1")
        return tensors

    def interrupt(self) -> None:
        self._interrupted.set()

    def _wait_for(self, key: str, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while not self._store.check([key]):
            if self._interrupted.wait(_POLL_S):
                raise TransferError("the channel was dropped")
            if time.monotonic() >= deadline:
                raise TransferError(f"nothing moved for {limit_s:g} s")


def _handle(tensor: Tensor) -> list[Any]:
    """What another process needs to map this tensor's memory, as plain values."""
    storage: Any = tensor.untyped_storage()
    index, handle, size, offset, counter, counter_offset, event, wait = storage._share_cuda_()
    uuid = str(torch.cuda.get_device_properties(index).uuid)
    inside = tensor.storage_offset()
    return [uuid, inside, handle, size, offset, counter, counter_offset, event, wait]


def _checked(packed: bytes, count: int) -> list[list[Any]]:
    handles = msgpack.unpackb(packed, max_buffer_size=1 << 20)
    good = isinstance(handles, list) and len(handles) == count
    for handle in handles if good else ():
        good = good and isinstance(handle, list) and tuple(map(type, handle)) == _FIELDS
    if not good:
        raise TransferError(f"the sender told {handles!r:.80}, not the handles of {count} tensors")
    return list(handles)


def _map(fields: list[Any], nbytes: int) -> Tensor:
    """A tensor on the sender's memory; it must be let go before the sender is told."""
    uuid, inside, handle, size, offset, counter, counter_offset, event, wait = fields
    if not 0 <= inside <= size - nbytes:
        raise TransferError(f"{nbytes} bytes from {inside} are not within a storage of {size}")
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == uuid:
            break
    else:
        raise TransferError(f"the sender's GPU {uuid} is not visible here")
    storage_class: Any = torch.UntypedStorage
    storage = storage_class._new_shared_cuda(
        index, handle, size, offset, counter, counter_offset, event, wait
    )
    mapped = torch.empty(0, dtype=torch.uint8, device=torch.device("cuda", index))
    return mapped.set_(storage, inside, (nbytes,), (1,))
