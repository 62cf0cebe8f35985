"""A process in a peer's environment that measures what it is asked to: JSON lines in and out."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

#: For one answer, and to leave once nothing more will be asked.
_ANSWER_S, _LEAVE_S = 300.0, 15.0


class Driver:
    """Runs ``script``; leaving the block ends it, and what it has started."""

    def __init__(self, name: str, python: Path, script: Path) -> None:
        self._name = name
        self._process = subprocess.Popen(
            [python, "-P", script],  # -P: what lies beside the script is not to be imported
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that its children can be ended with it
        )

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """What it answers. Raises ``RuntimeError`` when it ends instead, or takes too long."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        limit = threading.Timer(_ANSWER_S, self._kill)
        limit.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended: no answer will come
                self._process.stdin.write(json.dumps({"do": what, "with": arguments}) + "\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            limit.cancel()
        if not line:
            code = self._process.wait()
            raise RuntimeError(f"{self._name}'s process ended with {code}; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # type: ignore[union-attr]  # which ends it
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LEAVE_S)
        self._kill()
        self._process.wait()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
