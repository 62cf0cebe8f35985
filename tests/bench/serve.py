"""The worker process of transfer benchmarks: for each size a model whose embeddings have it.

``python -m tests.bench.serve BROKER MODE BYTES...`` Nothing is computed: what is measured is the
way.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from types import SimpleNamespace

import torch

from worker.direct.config import DirectConfig
from worker.service import Worker
from worker.targets.stub import StubTarget


class Ready(StubTarget):
    """Has a weight of so many bytes at hand."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(name=str(nbytes))
        self._weight = torch.randn(nbytes // 1024, 256)

    def get_input_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(weight=self._weight)


def main(broker: str, mode: str, *sizes: str) -> None:
    torch.set_num_threads(1)
    leaving = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: leaving.set())
    with contextlib.ExitStack() as stack:
        for nbytes in sizes:
            target, direct = Ready(int(nbytes)), DirectConfig(mode=mode)
            stack.enter_context(Worker(target, broker, name=f"{mode}-{nbytes}", direct=direct))
        leaving.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
