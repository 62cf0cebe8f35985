"""Clients on one host of a lab that ask all the time, and when each was answered."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import torch

from tests.hosts.lab import Lab
from tests.integration.conftest import VOCAB, tokens
from tests.waiting import eventually
from trainer_client.targets.remote import RemoteEagle3TargetModel
from worker.supervision.mapping import VocabMapping

#: Between two questions of a client: they are to be many clients, not much work.
_PAUSE_S = 0.05


class Crowd:
    """``answered_at[n]`` are the times of the answers to client ``n``, of the monotonic clock."""

    def __init__(self, clients: list[RemoteEagle3TargetModel]) -> None:
        self.answered_at: list[list[float]] = [[] for _ in clients]
        self.errors: list[Exception] = []
        self._leaving = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(client, times))
            for client, times in zip(clients, self.answered_at, strict=True)
        ]

    def served_after_s(self, since: float, patience_s: float) -> float:
        """Seconds from a time until every client has been answered again."""

        def all_served() -> bool:
            assert not self.errors, self.errors
            return all(times and times[-1] > since for times in self.answered_at)

        eventually(all_served, patience_s)
        first = [next(at for at in times if at > since) for times in self.answered_at]
        return max(first) - since

    def _ask(self, client: RemoteEagle3TargetModel, times: list[float]) -> None:
        try:
            while not self._leaving.wait(_PAUSE_S):
                client.generate_batch(*tokens(batch=1, length=8))
                times.append(time.monotonic())
        except Exception as error:
            self.errors.append(error)

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def crowd(lab: Lab, host: str, broker: str, count: int) -> Iterator[Crowd]:
    """So many clients of a broker, all served by the time that they are there."""

    mapping = VocabMapping(torch.arange(0, VOCAB, 2), VOCAB)

    def client() -> RemoteEagle3TargetModel:
        asking = RemoteEagle3TargetModel([broker], direct="off")
        asking.set_vocab_mapping(mapping.selected_token_ids, mapping.selected_token_mask)
        return asking

    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(lab.on(host, client)) for _ in range(count)]
        asking = stack.enter_context(Crowd(clients))
        asking.served_after_s(0.0, 60.0)
        yield asking
