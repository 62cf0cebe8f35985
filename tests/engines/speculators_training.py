"""Does vLLM's speculators train from our workers? Exits 1 when it does not.

``python -m tests.engines.speculators_training --python ENGINES_PYTHON`` starts a broker and a
worker here; speculators runs in the other environment, unpatched.
"""

from __future__ import annotations

import argparse
import lzma
import os
import subprocess
import sys
from pathlib import Path

from broker.service import Broker
from worker.service import Worker
from worker.targets import EMBEDDED, load_target

WORK = Path("build/engines")
#: What their Trainer says on a machine that has none.
NEEDS_ACCELERATOR = "Cannot access accelerator device when none is available"


def main(python: str) -> None:
    """Run it. Raises ``SystemExit`` with what went wrong."""
    WORK.mkdir(parents=True, exist_ok=True)
    text, data = WORK / "speculators.txt", WORK / "speculators-data"
    with lzma.open(EMBEDDED / "corpus.txt.xz", "rt", encoding="utf-8") as corpus:
        text.write_text(corpus.read(40_000), encoding="utf-8")
    target = load_target("embedded")
    with Broker() as broker, Worker(target, broker.worker_endpoint):
        url = broker.client_endpoint
        done = _run(
            python, "tests.engines.in_speculators_train", url, str(EMBEDDED), str(text), str(data)
        )
        if done.returncode:
            sys.exit(f"speculators did not learn from our workers: {done.stdout[-2000:]}")
        print(done.stdout.strip().splitlines()[-1])
        wanted = ["--speculator-type", "eagle3", "--verifier-name-or-path", str(EMBEDDED)]
        wanted += ["--data-path", str(data), "--save-path", str(WORK / "speculators-out")]
        wanted += ["--draftmq", url, "--num-workers", "1", "--total-seq-len", "512"]
        wanted += ["--loss-implementation", "eager", "--draft-attn-impl", "eager"]
        done = _run(python, "trainer_client.speculators", *wanted)
    if done.returncode and NEEDS_ACCELERATOR not in done.stdout:
        sys.exit(f"draftmq speculators-train ended early: {done.stdout[-2000:]}")
    print("the command ran", "up to its need of an accelerator" if done.returncode else "whole")


def _run(python: str, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [os.path.abspath(python), "-m", module, *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True)
    main(parser.parse_args().python)
