"""How rows leave vLLM's processes: in a dictionary, or in memory whose descriptor is handed over.

With the engine in this process nothing is moved. Else its first rank connects to a socket in the
abstract namespace of Linux, and sends for each prompt one anonymous memory file (``memfd``).
Neither has a name on any disk: a killed engine leaves nothing, in /dev/shm or elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_HEADER_BYTES = 4096

#: With the engine in this process: request -> states [T, L, H].
IN_PROCESS: dict[str, Tensor] = {}


class RowsSender:
    """The engine's end: puts a prompt's states where the worker takes them."""

    def __init__(self, address: str) -> None:
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._socket.connect("\0" + address)

    def put(self, request: str, states: Tensor) -> None:
        """Hand over states [T, L, H]. Raises ``OSError`` where the worker is gone."""
        if self._socket is None:
            IN_PROCESS[request] = states
            return
        octets = states.contiguous().view(-1).view(torch.uint8)
        descriptor = os.memfd_create("draftmq-rows")
        try:
            os.ftruncate(descriptor, octets.numel())
            _mapped(descriptor, octets.numel()).copy_(octets)
            said = {
                "request": request,
                "shape": list(states.shape),
                "dtype": str(states.dtype).removeprefix("torch."),
            }
            socket.send_fds(self._socket, [json.dumps(said).encode()], [descriptor])
        finally:
            os.close(descriptor)


class RowsReceiver:
    """The worker's end. A thread takes what the engine sends; when the engine is gone, it calls
    ``when_gone`` with the reason.
    """

    def __init__(self, when_gone: Callable[[str], None] = lambda why: None) -> None:
        self._when_gone = when_gone
        self.address = f"draftmq-{uuid.uuid4().hex}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind("\0" + self.address)
        self._listener.listen(1)
        self._rows: dict[str, Tensor] = {}
        self._changed = threading.Condition()
        #: why nothing more will come, if so
        self.gone = ""
        self._closing = False
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._receive, name="draftmq-rows", daemon=True)
        self._thread.start()

    def take(self, requests: Sequence[str], patience_s: float) -> list[Tensor]:
        """States [T, L, H] of requests that the engine is done with, on the CPU.

        Raises ``RuntimeError`` where the engine is gone, or they do not come within
        ``patience_s``.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self.gone or all(each in self._rows for each in requests), patience_s
            )
            missing = sum(each not in self._rows for each in requests)
            if missing:
                why = self.gone or f"they did not come within {patience_s} s"
                raise RuntimeError(
                    f"states of {missing} of {len(requests)} prompts are missing: {why}"
                )
            return [self._rows.pop(each) for each in requests]

    def close(self) -> None:
        """Stop listening, which ends the thread."""
        self._closing = True
        with contextlib.suppress(OSError):  # there may be nobody any more
            self._listener.shutdown(socket.SHUT_RDWR)
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _receive(self) -> None:
        try:
            self._connection, _ = self._listener.accept()
            with self._connection as connection:
                while True:
                    header, descriptors, _, _ = socket.recv_fds(connection, _HEADER_BYTES, 1)
                    if not header:
                        break
                    said = json.loads(header)
                    rows = _rows(descriptors[0], said["shape"], getattr(torch, said["dtype"]))
                    with self._changed:
                        self._rows[said["request"]] = rows
                        self._changed.notify_all()
        except OSError as error:
            self._end(f"the engine's connection broke ({error})")
        else:
            self._end("the engine has ended")

    def _end(self, why: str) -> None:
        with self._changed:
            self.gone = why
            self._changed.notify_all()
        if not self._closing:
            self._when_gone(why)


class InProcess:
    """The worker's end where the engine is in its process."""

    address = gone = ""

    def take(self, requests: Sequence[str], patience_s: float) -> list[Tensor]:
        """States [T, L, H], on the engine's device. Raises ``RuntimeError`` for what is missing."""
        del patience_s  # they are there as soon as the engine returns
        missing = [each for each in requests if each not in IN_PROCESS]
        if missing:
            raise RuntimeError(f"states of {len(missing)} of {len(requests)} prompts are missing")
        return [IN_PROCESS.pop(each) for each in requests]

    def close(self) -> None:
        """Forget what nobody took."""
        IN_PROCESS.clear()


def _rows(descriptor: int, shape: list[int], dtype: torch.dtype) -> Tensor:
    """The memory behind a descriptor, which is closed; the tensor keeps its pages."""
    try:
        return _mapped(descriptor, os.fstat(descriptor).st_size).view(dtype).view(shape)
    finally:
        os.close(descriptor)


def _mapped(descriptor: int, nbytes: int) -> Tensor:
    """The same as uint8 [nbytes]; by its path, since Python's mmap would keep a descriptor open."""
    path = f"/proc/self/fd/{descriptor}"
    return torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)
