"""The tutorial's commands for the shipped target, run in their order as tutorial.md has them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import Block, blocks_of
from tests.ports import free_port
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
BLOCKS = [
    block
    for block in blocks_of(ROOT / "docs" / "tutorial.md")
    if block.mark == "run" and block.why == "tests/docs/test_tutorial.py"
]
#: What keeps a walk short: the commands are the page's, the amounts are not.
SHORTER = {
    "--max-steps 300": "--max-steps 4",
    "--checkpoint-every 100": "--checkpoint-every 2",
    "draftmq eval ": "draftmq eval --count 2 --max-new-tokens 8 ",
}
SERVICES = ("draftmq broker", "draftmq worker")
#: Patience with one step: each imports torch, on a machine that may have much else to do.
STEP_S = 240


class Walk:
    """A shell in an empty folder, with ``draftmq`` on its path and ports of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "worker").symlink_to(ROOT / "worker")
        program = folder / "bin" / "draftmq"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m broker.commands "$@"\n')
        program.chmod(0o755)
        self._ports = {said: free_port() for said in ("5555", "5556", "9555")}
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith("DRAFTMQ_")
        } | {
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "DRAFTMQ_BROKER_CLIENTS": f"tcp://127.0.0.1:{self._ports['5555']}",
            "DRAFTMQ_BROKER_WORKERS": f"tcp://127.0.0.1:{self._ports['5556']}",
            "DRAFTMQ_BROKER_HTTP": f"127.0.0.1:{self._ports['9555']}",
            "DRAFTMQ_STATUS_HTTP": f"127.0.0.1:{self._ports['9555']}",
            "DRAFTMQ_TOP_HTTP": f"127.0.0.1:{self._ports['9555']}",
            "OMP_NUM_THREADS": "1",
        }
        self._services: list[tuple[str, subprocess.Popen[bytes]]] = []

    def take(self, block: Block) -> str:
        """Run a block, or start it where it is a service; what it printed."""
        text = re.sub(r":(5555|5556|9555)\b", lambda port: f":{self._ports[port[1]]}", block.text)
        for said, shorter in SHORTER.items():
            text = text.replace(said, shorter)
        if text.startswith(SERVICES):
            self._start(text)
            return ""
        done = subprocess.run(
            ["bash", "-euc", text],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=STEP_S,
            check=False,
        )
        assert done.returncode == 0, f"{block}:\n{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _start(self, text: str) -> None:
        name = text.split()[1]
        ready = {"broker": "event=listening", "worker": "event=attached"}[name]
        log = self.folder / f"{name}.log"
        with log.open("wb") as file:
            service = subprocess.Popen(
                ["bash", "-euc", f"exec {text}"],
                cwd=self.folder,
                env=self._environment,
                stderr=file,
                stdin=subprocess.DEVNULL,
            )
        self._services.append((name, service))
        eventually(lambda: ready in log.read_text() or service.poll() is not None, STEP_S)
        assert service.poll() is None, log.read_text()

    def end(self) -> None:
        for _, service in reversed(self._services):
            service.send_signal(signal.SIGTERM)
            service.wait(40)


@pytest.fixture
def walk(tmp_path: Path) -> Iterator[Walk]:
    walk = Walk(tmp_path)
    try:
        yield walk
    finally:
        walk.end()


@pytest.mark.heavy
def test_the_tutorial_ends_with_a_checked_draft(walk: Walk) -> None:
    printed = {str(block): walk.take(block) for block in BLOCKS}
    said = "\n".join(printed.values())
    for expected in (
        "2,000 text",  # data check
        "1 attached",  # doctor
        "steps: 4",  # dry run
        "draft:  runs/one/draft",  # train
        "1 worker",  # top and status
        "text identical to plain greedy decoding: yes",  # eval
        "0 findings in draft",  # export
    ):
        assert expected in said, said
    summary = json.loads((walk.folder / "runs" / "one" / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["requests"]["failures"] == 0


def test_the_walk_takes_every_step() -> None:
    commands = re.findall(r"draftmq (\w+)", "".join(block.text for block in BLOCKS))
    order = ["data", "broker", "worker", "doctor", "train", "train", "top", "status", "eval"]
    assert commands == [*order, "export", "export"]
