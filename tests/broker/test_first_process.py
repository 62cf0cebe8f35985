"""As a container's first process, a command ends by SIGTERM at any time, also while it imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
#: Imports for ever, in the place of torch and transformers.
_SLOW = "import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(600)\n"


def _may_unshare() -> bool:
    tried = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    return not subprocess.run(tried, capture_output=True, check=False).returncode


@pytest.mark.parametrize("command", ["worker", "eval"])
def test_sigterm_ends_the_first_process_while_it_imports(tmp_path: Path, command: str) -> None:
    if os.geteuid() or not _may_unshare():
        pytest.skip("a process number 1 needs root and namespaces of its own (unshare)")
    (tmp_path / "transformers.py").write_text(_SLOW)
    options = {
        "worker": ["--broker", "tcp://127.0.0.1:5556", "--target", "embedded"],
        "eval": ["--draft", str(tmp_path), "--target", "embedded"],
    }
    program = [sys.executable, "-m", "broker.commands", command, *options[command]]
    outside = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", *program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    try:
        eventually(lambda: (tmp_path / "importing").exists())
        children = Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text().split()
        asked = time.monotonic()
        os.kill(int(children[0]), signal.SIGTERM)
        outside.wait(20)
        assert time.monotonic() - asked < 20
    finally:
        outside.kill()
        outside.wait()
