"""Runs in Mooncake's environment: its master and one who puts as children, one who gets here.

Reads a line of JSON for each measurement, and writes one. Nothing of draftmq is imported. Objects
are put from registered memory and got into registered memory, the store's way without copies of its
own, and all connections are kept.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Set before the library is loaded, here and in the child. With these slices 64 MiB and more are
#: a fifth faster than with the library's own.
os.environ |= {
    "MC_TCP_ENABLE_CONNECTION_POOL": "1",
    "MC_TCP_SLICE_SIZE": str(4 << 20),
    "MC_LOG_LEVEL": "ERROR",
}

import mooncake
import numpy as np
from mooncake.store import MooncakeDistributedStore

_HOST = "127.0.0.1"
_START_S, _LEAVE_S, _ANSWER_S = 20.0, 5.0, 120.0
#: Of the store's own, for what is not registered: nothing here.
_LOCAL_BYTES = 16 << 20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def store_client(master: str, segment_bytes: int) -> Any:
    store = MooncakeDistributedStore()
    own = f"{_HOST}:{free_port()}"
    code = store.setup(own, "P2PHANDSHAKE", segment_bytes, _LOCAL_BYTES, "tcp", "", master)
    _must(code == 0, "setup", code)
    return store


def registered(store: Any, memory: Any) -> int:
    """The address of an array that the store may read and write."""
    code = store.register_buffer(memory.ctypes.data, memory.nbytes)
    _must(code == 0, "register_buffer", code)
    return int(memory.ctypes.data)


def pattern(nbytes: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)


def _must(fine: bool, what: str, code: int) -> None:
    if not fine:
        raise RuntimeError(f"the store's {what} gave {code}")


def put_what_is_asked_for(asked: Any, master: str, largest: int) -> None:
    """The child: puts ``(key, bytes)``, takes everything away for ``None``, ends with the pipe."""
    store = store_client(master, 4 * largest)
    memory = pattern(largest)
    address = registered(store, memory)
    asked.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            wanted = asked.recv()
            if wanted is None:
                code = store.remove_all(True)
                _must(code >= 0, "remove_all", code)
            else:
                key, nbytes = wanted
                code = store.put_from(key, address, nbytes)
                _must(code == 0, "put_from", code)
            asked.send("done")
    store.close()


class Getter:
    """Asks for objects and gets each into the same memory, again and again."""

    def __init__(self, master: str, asking: Any, largest: int) -> None:
        self._asking = asking
        self._store = store_client(master, 0)
        self._memory = np.zeros(largest, dtype=np.uint8)
        self._address = registered(self._store, self._memory)
        self._wanted = pattern(largest)
        self._count = 0

    def take(self, nbytes: int, replies: int, depth: int) -> dict[str, float]:
        """Seconds for each; the last is compared, outside the time."""
        self._asking.send(None)
        self._answered()
        self._memory[:nbytes] = 0
        began = time.perf_counter()
        under_way = [self._ask(nbytes) for _ in range(depth)]
        for taken in range(replies):
            self._answered()
            code = self._store.get_into(under_way.pop(0), self._address, nbytes)
            _must(code == nbytes, "get_into", code)
            if taken < replies - depth:
                under_way.append(self._ask(nbytes))
        seconds = (time.perf_counter() - began) / replies
        assert np.array_equal(self._memory[:nbytes], self._wanted[:nbytes])
        return {"seconds": seconds}

    def close(self) -> None:
        self._store.close()

    def _ask(self, nbytes: int) -> str:
        self._count += 1
        key = str(self._count)
        self._asking.send((key, nbytes))
        return key

    def _answered(self) -> None:
        if not self._asking.poll(_ANSWER_S):
            raise RuntimeError(f"nothing was put within {_ANSWER_S:.0f} s")
        self._asking.recv()


@contextlib.contextmanager
def started(largest: int) -> Iterator[Getter]:
    """The store with its two clients; leaving ends them, those who get and put first."""
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(_master())
        context = multiprocessing.get_context("spawn")
        asking, asked = context.Pipe()
        arguments = (asked, master, largest)
        putter = context.Process(target=put_what_is_asked_for, args=arguments, daemon=True)
        putter.start()
        asked.close()  # so that the end of that process is seen here
        stack.callback(_join, putter)
        stack.callback(asking.close)
        if not asking.poll(_START_S):
            raise RuntimeError("the one who puts did not come up")
        asking.recv()
        getter = Getter(master, asking, largest)
        stack.callback(getter.close)
        yield getter


def _join(putter: Any) -> None:
    putter.join(_LEAVE_S)
    putter.kill()
    putter.join()


@contextlib.contextmanager
def _master() -> Iterator[str]:
    """The address of a master that is up."""
    program = Path(mooncake.__file__).with_name("mooncake_master")
    program.chmod(0o755)  # the wheel does not say that it is one
    port = free_port()
    process = subprocess.Popen(
        [
            program,
            f"-rpc_address={_HOST}",
            f"-rpc_port={port}",
            f"-metrics_host={_HOST}",
            f"-metrics_port={free_port()}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, process)
        yield f"{_HOST}:{port}"
    finally:
        process.terminate()
        try:
            process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(port: int, process: Any) -> None:
    end = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection((_HOST, port)).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the store's master did not come up") from None
            time.sleep(0.02)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer
    with contextlib.ExitStack() as stack:
        getter: Getter | None = None
        for line in sys.stdin:
            asked = json.loads(line)
            if getter is None:
                getter = stack.enter_context(started(**asked["with"]))
                measured: dict[str, float] = {}
            else:
                measured = getter.take(**asked["with"])
            print(json.dumps(measured), file=answers, flush=True)


if __name__ == "__main__":
    main()
