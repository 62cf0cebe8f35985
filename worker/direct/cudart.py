"""The few calls of the CUDA runtime that memory shared between processes takes.

torch shares memory too, for each tensor anew: with a reference counter in ``/dev/shm`` that a
receiver's death leaves standing, an event that is never closed, and an allocator that keeps what is
shared until the process ends badly. Memory of our own, made once and mapped once, has none of them.
torch has loaded the runtime already; this finds it where the process has it.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worker.direct.backend import TransferError

#: ``cudaIpcMemHandle_t``, passed by value.
HANDLE_BYTES = 64
_LAZY_ENABLE_PEER_ACCESS = 1


class Handle(ctypes.Structure):
    """What names memory of one process to another on the same host."""

    _fields_ = [("reserved", ctypes.c_ubyte * HANDLE_BYTES)]


class Region:
    """Memory on a GPU that this process has, or has mapped; close it once nobody uses it."""

    def __init__(self, device: torch.device, nbytes: int, handle: bytes | None = None) -> None:
        """Make ``nbytes`` of memory, or map what ``handle`` names.

        Raises :class:`TransferError` where there is no memory, or it cannot be mapped: another
        GPU, another host, this very process, or a sandbox that forbids it.
        """
        self._device, self._nbytes, self._made = device, nbytes, handle is None
        self._pointer = ctypes.c_void_p()
        with torch.cuda.device(device):
            if handle is None:
                _call("cudaMalloc", ctypes.byref(self._pointer), ctypes.c_size_t(nbytes))
            else:
                named = Handle.from_buffer_copy(handle)
                flags = ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS)
                _call("cudaIpcOpenMemHandle", ctypes.byref(self._pointer), named, flags)

    @property
    def handle(self) -> bytes:
        """What another process maps it by, 64 bytes. Raises :class:`TransferError`."""
        handle = Handle()
        with torch.cuda.device(self._device):
            _call("cudaIpcGetMemHandle", ctypes.byref(handle), self._pointer)
        return bytes(handle)

    def tensor(self) -> Tensor:
        """All of it, uint8 [nbytes]; to be let go of before :meth:`close`."""
        return on_pointer(self._pointer.value or 0, self._nbytes, self._device)

    def close(self) -> None:
        """Free it, or unmap it. What the GPU still does with it is waited for."""
        if self._pointer:
            with torch.cuda.device(self._device):
                _call("cudaFree" if self._made else "cudaIpcCloseMemHandle", self._pointer)
            self._pointer = ctypes.c_void_p()


def on_pointer(pointer: int, nbytes: int, device: torch.device) -> Tensor:
    """A uint8 tensor [nbytes] on memory that torch did not make."""

    class Memory:
        __cuda_array_interface__ = {  # noqa: RUF012 - a protocol's name
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }

    return torch.as_tensor(Memory(), device=device)


def _call(name: str, *arguments: Any) -> None:
    runtime = library()
    problem = getattr(runtime, name)(*arguments)
    if problem:
        runtime.cudaGetLastError()  # it is told here, and must not be found by torch's next call
        text = runtime.cudaGetErrorString(problem).decode()
        raise TransferError(f"{name}: {text} ({problem})")


@functools.cache
def library() -> Any:
    """The CUDA runtime that torch has loaded. Raises :class:`TransferError` where it has none."""
    try:
        mapped = Path("/proc/self/maps").read_text().split()
    except OSError as error:
        raise TransferError(f"the CUDA runtime of this process is not known: {error}") from error
    path = next((word for word in mapped if "/libcudart" in word), None)
    if path is None:
        raise TransferError("this process has no CUDA runtime as a library of its own")
    runtime = ctypes.CDLL(path)
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    return runtime
