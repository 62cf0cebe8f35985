"""A trainer in a process of its own: ``... trainer ENDPOINT BACKEND [--strike | --fork]``.

It takes five batches directly and ends with 0; with ``--strike`` it kills itself in the midst of
receiving the third, with ``--fork`` a child of it comes and goes, and it takes five more.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from tests.integration.direct.conftest import Trainer, settings
from tests.integration.direct.worker import make_target
from trainer_client.targets.remote import RemoteEagle3TargetModel
from worker.direct import gloo, shm


class StruckGloo(gloo.GlooBackend):
    """Kills its process when half of the third transfer is posted."""

    _transfers = 0

    def _receive(self, seq: int, tensors: Any, limit: Any) -> None:
        self._transfers += 1
        super()._receive(seq, tensors, limit)

    def _post_receive(self, tensor: torch.Tensor) -> Any:
        work = super()._post_receive(tensor)
        if self._transfers == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return work


class StruckShm(shm.ShmBackend):
    """Kills its process when it has copied half of the third transfer."""

    _transfers = 0

    def receive(self, seq: int, sizes: Any, limit_s: float) -> Any:
        self._transfers += 1
        return super().receive(seq, sizes, limit_s)

    def _say(self, seq: int, number: int) -> None:
        super()._say(seq, number)
        if self._transfers == 3 and number == 8:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if "--strike" in sys.argv:
        gloo.GlooBackend = StruckGloo  # type: ignore[misc]
        shm.ShmBackend = StruckShm  # type: ignore[misc]
    with RemoteEagle3TargetModel.from_urls([sys.argv[1]], **settings(sys.argv[2])) as remote:
        trainer = Trainer(remote, make_target())
        trainer.until_direct(5)
        if "--fork" in sys.argv:
            if (child := os.fork()) == 0:
                remote._client._direct.close()  # what closing a worker does, which has no guard
                sys.exit(3)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
            trainer.until_direct(5)
            assert trainer.counter("direct_failed") == 0
