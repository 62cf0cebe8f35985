"""Tensors on their way from a worker process to a client here, through a broker process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.integration.test_processes import free_port
from trainer_client.demo import Processes
from trainer_client.direct import Receiver
from trainer_client.service import Client
from worker.direct.config import DirectConfig

PATIENCE_S = 120.0


class Taker:
    """Asks for embeddings of a size, and says how long they took."""

    def __init__(self, client: Client, directly: bool) -> None:
        self._client = client
        self._directly = directly

    def take(self, mib: int) -> float:
        """Seconds from the request until the tensor is here; the way is checked."""
        end = time.monotonic() + PATIENCE_S
        while True:
            began = time.perf_counter()
            pending = self._client.submit(
                "input_embeddings", timeout_s=PATIENCE_S, model=f"{mib}MiB"
            )
            answer = pending.result()
            seconds = time.perf_counter() - began
            assert answer.tensors["weight"].nbytes == mib << 20
            if (answer.reply.transfer is not None) == self._directly:
                return seconds
            assert self._directly, "a client without direct transfers was answered directly"
            assert time.monotonic() < end, "no direct channel came about"


@contextlib.contextmanager
def direct_and_wire(
    sizes: Sequence[int], logs: Path
) -> Iterator[tuple[Callable[[int], float], Callable[[int], float]]]:
    """``(direct, wire)``: functions from MiB to seconds, through one broker and one worker."""
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(Processes(logs))
        ends = [f"tcp://127.0.0.1:{free_port()}" for _ in range(2)]
        http = f"127.0.0.1:{free_port()}"
        broker = ["--clients", ends[0], "--workers", ends[1], "--http", http]
        processes.start("broker", ["broker", *broker])
        processes.start("worker", ["tests.bench.serve", ends[1], "gloo", *sizes])
        receiver = Receiver(DirectConfig(mode="gloo", min_bytes=1), "cpu", [ends[0]])
        direct = stack.enter_context(Client([ends[0]], name="direct", direct=receiver))
        wire = stack.enter_context(Client([ends[0]], name="wire"))
        yield Taker(direct, True).take, Taker(wire, False).take
