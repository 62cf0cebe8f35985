"""The target of the lab's workers: ``--target-factory tests.hosts.target:tiny``."""

from __future__ import annotations

from tests.integration.conftest import make_target
from worker.targets.huggingface import HuggingFaceTarget


def tiny() -> HuggingFaceTarget:
    return make_target()
