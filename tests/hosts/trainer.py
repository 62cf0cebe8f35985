"""``python -m tests.hosts.trainer``: trains what lines on its standard input ask for.

A line is JSON: ``output``, ``brokers``, and ``hold``, a step at which it says ``held`` and waits
for another line. It answers each with ``done``, or with the error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.integration.test_training import ByteTokenizer, settings
from trainer_client.errors import TrainerClientError
from trainer_client.targets.remote import RemoteEagle3TargetModel
from trainer_client.training.run import train
from trainer_client.training.settings import TrainSettings
from trainer_client.training.trainer import StepMetrics
from worker.direct.config import DirectConfig

#: What every run of the lab trains: so short that a fault is the longest part of it.
STEPS = 24


def wanted(output: Path) -> TrainSettings:
    return settings(output.parent, output.name, max_steps=STEPS, max_length=16)


def main() -> None:
    """Until the standard input ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)

        def hold(step: StepMetrics, at: int = asked["hold"]) -> None:
            if step.step == at:
                print("held", flush=True)
                sys.stdin.readline()

        direct = DirectConfig(**asked.get("direct", {"mode": "off"}))
        try:
            with RemoteEagle3TargetModel(asked["brokers"], timeout=120, direct=direct) as backend:
                train(wanted(Path(asked["output"])), backend, ByteTokenizer(), on_step=hold)
        except TrainerClientError as error:
            print(f"error: {error}", flush=True)
        else:
            print("done", flush=True)


if __name__ == "__main__":
    main()
