"""The processes of one target that is cut over several: rank 0 says what is run, the others follow.

What ranks tell one another about tensors is the process group's. Beside it each follower has a
connection to rank 0 (``multiprocessing.connection``, whose key goes through the process group): the
orders go out there and a word comes back for each, and its end says at once, also while nothing
runs or a collective hangs, that a process is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import torch
import torch.distributed as dist

from broker.logs import log
from worker.errors import TargetError, TargetGoneError
from worker.targets.torchrun import join_process_group

_logger = logging.getLogger("draftmq.worker")

#: When one rank has ended what all run, or has failed in it, the others have so long: longer than
#: any of them can lag behind, for they wait for one another in every layer.
PATIENCE_S = 60.0
#: The order that ends a follower.
_END = "end"

#: What all ranks can run together: name -> the part of this rank.
Operations = Mapping[str, Callable[..., Any]]


class Ranks:
    """This process among those that torchrun started.

    ``lead`` and ``follow`` are the two lives that it can have; :attr:`rank` says which one.
    """

    def __init__(self, rank: int, size: int, connections: Sequence[Connection]) -> None:
        self.rank = rank
        self.size = size
        self._connections = list(connections)  # of rank 0 to the others in order, or to rank 0

    def lead(self, name: str, operations: Operations) -> Leader:
        """Have the others, which :meth:`follow`, run what this process runs."""
        return Leader(name, self._connections, operations)

    def follow(self, operations: Operations) -> None:
        """Run what rank 0 says until it says that this is the end. SIGTERM and SIGINT are for rank
        0, which finishes what it holds; if that is gone, this process ends with 1.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        log(_logger, "info", "rank_follows", {"rank": self.rank, "of": self.size})
        (leader,) = self._connections
        orders: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()

        def read() -> None:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    orders.put(order := leader.recv())
                    if order[0] == _END:
                        return
            log(_logger, "error", "leader_gone", {"rank": self.rank})
            os._exit(1)  # the main thread may hang in a collective for ever

        threading.Thread(target=read, name="draftmq-orders", daemon=True).start()
        while (order := orders.get())[0] != _END:
            failure = ""
            try:
                operations[order[0]](*order[1])
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError):  # read() sees to it
                leader.send(failure)
        dist.destroy_process_group()


class Leader:
    """Rank 0: runs operations together with all others.

    :attr:`when_gone` is told when another rank ends by itself.
    """

    def __init__(
        self, name: str, connections: Sequence[Connection], operations: Operations
    ) -> None:
        self._name = name
        self._operations = operations
        self._connections = dict(enumerate(connections, start=1))
        self._one_at_a_time = threading.Lock()
        #: a follower's word about an order: its rank, and what went wrong; None: one is gone
        self._words: queue.SimpleQueue[tuple[int, str] | None] = queue.SimpleQueue()
        self._order = 0
        self._under_way = 0  # the order that this process has not ended yet, or 0
        self._gone: TargetGoneError | None = None
        self._ended = False
        self.when_gone: Callable[[TargetGoneError], None] = lambda error: None
        for each in self._connections.items():
            threading.Thread(
                target=self._listen, args=each, name=f"draftmq-rank-{each[0]}", daemon=True
            ).start()

    def run(self, operation: str, *arguments: Any) -> Any:
        """What this rank's part gives, when all have run theirs.

        Raises what this rank's part raised where the others are in step with it afterwards, and
        :class:`TargetGoneError` where they are not.
        """
        with self._one_at_a_time:
            self._order += 1
            self._under_way = self._order
            try:
                self._send((operation, arguments))
                made = self._operations[operation](*arguments)
            except Exception:
                self._under_way = 0
                self._collect()
                raise
            self._under_way = 0
            failed = [f"rank {rank}: {word}" for rank, word in self._collect() if word]
            if failed:
                raise TargetError(f"target {self._name!r} failed in {'; '.join(failed)}")
            return made

    def end(self) -> None:
        """Send the others home, and leave the process group; not where one is gone."""
        with self._one_at_a_time:
            if self._ended or self._gone:
                return
            self._ended = True
            for each in self._connections.values():
                with contextlib.suppress(OSError):
                    each.send((_END, ()))
        dist.destroy_process_group()

    def _send(self, order: tuple[str, tuple[Any, ...]]) -> None:
        for rank, each in self._connections.items():
            if self._gone is None:
                try:
                    each.send(order)
                except OSError:
                    self._lost(f"rank {rank} has ended")
        if self._gone is not None:
            raise self._gone

    def _collect(self) -> list[tuple[int, str]]:
        """What each follower says of the order that this process has ended."""
        words: list[tuple[int, str]] = []
        while len(words) < len(self._connections) and self._gone is None:
            try:
                word = self._words.get(timeout=PATIENCE_S)
            except queue.Empty:
                missing = sorted({*self._connections} - {rank for rank, _ in words})
                self._lost(f"rank {missing[0]} did not end in {PATIENCE_S:.0f} s what all ran")
                break
            words += [] if word is None else [word]
        if self._gone is not None:
            raise self._gone
        return words

    def _listen(self, rank: int, connection: Connection) -> None:
        try:
            while True:
                word: str = connection.recv()
                order = self._order
                self._words.put((rank, word))
                if word and not connection.poll(PATIENCE_S) and self._under_way == order:
                    return self._lost(f"rank {rank} failed ({word}), and rank 0 hangs in the same")
        except (EOFError, OSError):
            if not self._ended:
                self._lost(f"rank {rank} has ended")

    def _lost(self, why: str) -> None:
        if self._gone is not None:
            return
        self._gone = TargetGoneError(
            f"the ranks of target {self._name!r} are no longer together ({why}); this worker ends, "
            "torchrun with --max-restarts starts all ranks again, and the reason is in the log of "
            "that rank"
        )
        self._words.put(None)
        self.when_gone(self._gone)


def join(device: str, wanted: int = 0) -> Ranks:
    """Meet the other ranks that torchrun started. Raises :class:`TargetError` outside of it.

    ``device`` is "cpu" or "cuda"; with the second each process has the GPU of its local rank.
    ``wanted`` is how many ranks there should be, if that is not 0.
    """
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        raise TargetError(
            "--tp of a model that transformers runs needs its ranks: start it with torchrun "
            "--nproc-per-node N -m worker --tp ..., or inside vLLM with --target vllm:MODEL --tp N"
        )
    size = int(os.environ["WORLD_SIZE"])
    if size < 2 or wanted not in (0, size):
        raise TargetError(
            f"torchrun started {size} ranks, where --tp wants {wanted or 'two or more'}; say "
            "torchrun --nproc-per-node N, and --tp N or --tp alone"
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    join_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    rank = dist.get_rank()
    return Ranks(rank, size, _connected(rank, size))


def _connected(rank: int, size: int) -> list[Connection]:
    """Rank 0's connections to the others in order, or the one to rank 0."""
    cpu = torch.device("cpu")
    if rank:
        said: list[Any] = [None]
        dist.broadcast_object_list(said, src=0, device=cpu)
        address, key = said[0]
        connection = Client(address, authkey=key)
        connection.send(rank)
        return [connection]
    key = secrets.token_bytes(32)
    host = os.environ["MASTER_ADDR"]  # where torchrun's own store is reached
    try:
        listener = Listener((host, 0), backlog=size, authkey=key)
    except OSError as error:
        raise TargetError(
            f"rank 0 cannot listen on {host} for the other ranks ({error}); torchrun's "
            "--master-addr must be an IPv4 address or name of this host"
        ) from error
    with listener:
        dist.broadcast_object_list([(listener.address, key)], src=0, device=cpu)
        accepted = [listener.accept() for _ in range(size - 1)]
    return [each for _, each in sorted((each.recv(), each) for each in accepted)]
