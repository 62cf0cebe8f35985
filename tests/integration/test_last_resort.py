"""A worker ends when it is asked to, whatever its target does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from broker.service import Broker
from tests.vocab import shuffled
from tests.waiting import eventually
from trainer_client.targets.remote import RemoteEagle3TargetModel
from worker.supervision.mapping import VocabMapping


@pytest.mark.parametrize("how", ["Sleeping", "Holding"])
def test_a_worker_whose_target_hangs_is_gone_soon_after_its_drain_time(how: str) -> None:
    with Broker() as broker:
        factory = f"tests.integration.hanging:{how}"
        command = [sys.executable, "-m", "worker", "--broker", broker.worker_endpoint]
        command += ["--target-factory", factory, "--drain-s", "0.5", "--no-canary"]
        worker = subprocess.Popen(command)
        try:
            url = broker.client_endpoint
            with RemoteEagle3TargetModel.from_urls([url], device="cpu", timeout=60) as remote:
                ids = torch.arange(12).view(2, 6)
                mapping = VocabMapping(shuffled(torch.arange(0, 64, 2)), 64)
                remote.set_vocab_mapping(mapping.selected_token_ids, mapping.selected_token_mask)
                handle = remote.generate_batch_async(
                    ids, torch.ones_like(ids), torch.ones_like(ids)
                )
                eventually(lambda: broker.snapshot()["requests"]["running"])
                asked = time.monotonic()
                worker.send_signal(signal.SIGTERM)
                assert worker.wait(60) == -signal.SIGKILL
                assert time.monotonic() - asked >= 5.0  # it had its drain time, and some
                handle.cancel()
        finally:
            worker.kill()
            worker.wait()


def test_a_worker_that_ends_leaves_no_process_behind() -> None:
    with Broker() as broker:
        command = [sys.executable, "-m", "worker", "--broker", broker.worker_endpoint]
        command += ["--target-factory", "worker.targets.stub:StubTarget", "--drain-s", "0.5"]
        worker = subprocess.Popen(command)
        eventually(lambda: broker.snapshot()["workers"], 60)
        children = os.listdir(f"/proc/{worker.pid}/task/{worker.pid}")
        assert "children" in children
        with open(f"/proc/{worker.pid}/task/{worker.pid}/children") as file:
            (child,) = map(int, file.read().split())
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
        eventually(lambda: not os.path.exists(f"/proc/{child}"))
