"""Stand-ins for a GPU: the backends for CUDA tensors run on the CPU, line by line.

Torch's bindings are asked as far as a CPU build has them: what is called with arguments that they
do not take fails here as it would on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import ProcessGroupGloo

from worker.direct import cudart

UUID = "GPU-stand-in"


class Runtime:
    """The CUDA runtime with memory of this process; its calls take what the C functions take."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.mapped: list[int] = []
        self.refuse_mapping = False

    def cudaMalloc(self, pointer: Any, size: ctypes.c_size_t) -> int:  # noqa: N802
        block = (ctypes.c_ubyte * size.value)()
        self.memory[ctypes.addressof(block)] = block
        pointer._obj.value = ctypes.addressof(block)
        return 0

    def cudaFree(self, pointer: ctypes.c_void_p) -> int:  # noqa: N802
        del self.memory[pointer.value or 0]
        return 0

    def cudaIpcGetMemHandle(self, handle: Any, pointer: ctypes.c_void_p) -> int:  # noqa: N802
        octets = (pointer.value or 0).to_bytes(cudart.HANDLE_BYTES, "big")
        ctypes.memmove(ctypes.byref(handle._obj), octets, cudart.HANDLE_BYTES)
        return 0

    def cudaIpcOpenMemHandle(  # noqa: N802
        self, pointer: Any, handle: cudart.Handle, flags: ctypes.c_uint
    ) -> int:
        if self.refuse_mapping:
            return 201
        pointer._obj.value = int.from_bytes(bytes(handle), "big")
        assert pointer._obj.value in self.memory
        self.mapped.append(pointer._obj.value)
        return 0

    def cudaIpcCloseMemHandle(self, pointer: ctypes.c_void_p) -> int:  # noqa: N802
        self.mapped.remove(pointer.value or 0)
        return 0

    def cudaGetLastError(self) -> int:  # noqa: N802
        return 0

    def cudaGetErrorString(self, problem: int) -> bytes:  # noqa: N802
        return b"invalid device context"


def _on_pointer(pointer: int, nbytes: int, device: torch.device) -> torch.Tensor:
    block = (ctypes.c_ubyte * nbytes).from_address(pointer)
    return torch.frombuffer(block, dtype=torch.uint8)


class _Stream:
    def __init__(self, device: torch.device, priority: int = 0) -> None:
        pass


class _Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        pass

    def record(self, stream: _Stream) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def cuda(patch: pytest.MonkeyPatch) -> Runtime:
    """One GPU, in host memory."""
    runtime = Runtime()
    patch.setattr(cudart, "library", lambda: runtime)
    patch.setattr(cudart, "on_pointer", _on_pointer)
    patch.setattr(torch.cuda, "Stream", _Stream)
    patch.setattr(torch.cuda, "Event", _Event)
    patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    patch.setattr(torch.cuda, "default_stream", lambda device: None)
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = SimpleNamespace(uuid=UUID)
    patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    return runtime


class _Work:
    """What coalesced operations give. Gloo knows of its end only in a wait, so a thread waits."""

    def __init__(self, works: list[Any], fails: str = "") -> None:
        self._error: Exception | None = RuntimeError(fails) if fails else None
        self._waiting = threading.Thread(target=self._wait, args=([] if fails else works,))
        self._waiting.start()

    def _wait(self, works: list[Any]) -> None:
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            self._error = error

    def is_completed(self) -> bool:
        """Also true on an error, as NCCL's."""
        return not self._waiting.is_alive()

    def wait(self) -> None:
        self._waiting.join()
        if self._error is not None:
            raise self._error


class NcclGroup:
    """A communicator of two, by Gloo; coalescing is asked of the binding that NCCL's shares."""

    #: what the next operation fails with, as a communicator's error does: it is "completed" then
    fails = ""

    class Options:
        _timeout: timedelta

    def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
        self._peer, self._gloo_options = 1 - rank, ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        self._gloo_options._timeout = options._timeout
        self._gloo_options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        self._gloo_options._threads = 1
        self._made_of = (store, rank, size, self._gloo_options)
        self._tags = itertools.count(1)
        self._works: list[Any] = []

    def eager_connect_single_device(self, device: torch.device) -> None:
        self._gloo: Any = ProcessGroupGloo(*self._made_of)

    def _start_coalescing(self, *arguments: Any) -> None:
        self._ask(self._gloo._start_coalescing, *arguments)
        self._works = []

    def _end_coalescing(self, *arguments: Any) -> _Work:
        self._ask(self._gloo._end_coalescing, *arguments)
        return _Work(self._works, NcclGroup.fails)

    def _ask(self, call: Any, *arguments: Any) -> None:
        with pytest.raises(RuntimeError, match=r"does not (implement|support)"):
            call(*arguments)  # a TypeError is what it is for a GPU's

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        self._works.append(self._gloo.send(tensors, peer, next(self._tags)))

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        self._works.append(self._gloo.recv(tensors, peer, next(self._tags)))

    def abort(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._gloo.recv([torch.zeros(1)], 1 - self._gloo.rank(), 1 << 30).wait(
                timedelta(milliseconds=1)
            )


def nccl(patch: pytest.MonkeyPatch) -> None:
    """NCCL between two ends of one process."""
    cuda(patch)
    patch.setattr(torch.distributed, "ProcessGroupNCCL", NcclGroup, raising=False)


@contextlib.contextmanager
def standing_in(backend: str) -> Iterator[None]:
    """What a backend's tests need on a machine without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        {"ipc": cuda, "nccl": nccl}.get(backend, lambda patch: None)(patch)
        yield
