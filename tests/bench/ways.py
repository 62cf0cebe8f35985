"""Tensors on their way from a worker process to a client here, through a broker process."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.ports import free_port
from trainer_client.commands.demo import Processes
from trainer_client.service import Answer, Client, PendingReply
from worker.direct.config import DirectConfig
from worker.direct.receiver import Receiver

PATIENCE_S = 120.0


#: Requests under way at once, as a prefetching trainer has them.
DEPTH = 2


class Taker:
    """Asks for embeddings of a size, and says how long they took."""

    def __init__(self, client: Client, direct_from: float) -> None:
        self._client = client
        #: replies of so many bytes come directly, and smaller ones by wire
        self._direct_from = direct_from

    def take(self, nbytes: int, replies: int, depth: int = DEPTH) -> float:
        """Seconds for each of so many replies; all came the way that is measured."""
        if nbytes >= self._direct_from:
            self._settle(nbytes)
        began = time.perf_counter()
        under_way = [self._ask(nbytes) for _ in range(depth)]
        for taken in range(replies):
            answer = under_way.pop(0).result()
            assert answer.tensors["weight"].nbytes == nbytes
            assert self._came_right(answer, nbytes)
            if taken < replies - depth:
                under_way.append(self._ask(nbytes))
        return (time.perf_counter() - began) / replies

    def _settle(self, nbytes: int) -> None:
        """The first replies of a worker come by wire, until there is a channel."""
        end = time.monotonic() + PATIENCE_S
        while not self._came_right(self._ask(nbytes).result(), nbytes):
            assert time.monotonic() < end, "no direct channel came about"

    def _ask(self, nbytes: int) -> PendingReply:
        return self._client.submit("input_embeddings", timeout_s=PATIENCE_S, model=str(nbytes))

    def _came_right(self, answer: Answer, nbytes: int) -> bool:
        return (answer.reply.transfer is not None) == (nbytes >= self._direct_from)


@contextlib.contextmanager
def direct_and_wire(
    sizes: Sequence[int], logs: Path
) -> Iterator[dict[str, Callable[[int, int], float]]]:
    """``direct``, as is the default here, ``gloo`` and ``wire``: each is :meth:`Taker.take`.

    All three go through one broker and to one worker.
    """
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(Processes(logs))
        ends = [f"tcp://127.0.0.1:{free_port()}" for _ in range(2)]
        http = f"127.0.0.1:{free_port()}"
        broker = ["--clients", ends[0], "--workers", ends[1], "--http", http]
        processes.start("broker", ["broker", *broker])
        processes.start("worker", ["tests.bench.serve", ends[1], "auto", *sizes])
        ways = {}
        for name, mode in (("direct", "auto"), ("gloo", "gloo"), ("wire", "off")):
            config = DirectConfig(mode=mode)
            receiver = Receiver(config, "cpu", [ends[0]])
            client = stack.enter_context(Client([ends[0]], name=name, direct=receiver))
            ways[name] = Taker(client, direct_from(config)).take
        yield ways


def direct_from(config: DirectConfig) -> float:
    """Bytes of the smallest reply that comes directly."""
    return math.inf if config.mode == "off" else config.min_bytes
