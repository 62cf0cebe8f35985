"""The end of a worker that does not end by itself.

A target may hang in C code with Python's lock held; then no signal handler of ours runs, and no
thread. But the C part of Python's handler still writes a signal's number to a descriptor, and a
small process that reads it can wait and then kill.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import TracebackType

_WATCH = """
import os, select, signal, sys, time
worker, grace_s = int(sys.argv[1]), float(sys.argv[2])
wanted = {signal.SIGTERM, signal.SIGINT}
asked = os.read(0, 1)
while asked and asked[0] not in wanted:
    asked = os.read(0, 1)
end = time.monotonic() + grace_s
while asked:
    if not select.select([0], [], [], max(0.0, end - time.monotonic()))[0]:
        os.kill(worker, signal.SIGKILL)
        break
    asked = os.read(0, 64)  # nothing when the worker has ended
"""


class LastResort:
    """Kills this process ``grace_s`` after its first SIGTERM or SIGINT, if it is still there.

    For the main thread, around what handles the signals. It costs a process of some 10 MB.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s

    def __enter__(self) -> LastResort:
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        command = [sys.executable, "-I", "-S", "-c", _WATCH, str(os.getpid()), str(self._grace_s)]
        # a session of its own: a signal for the worker's group is not for it
        self._watch = subprocess.Popen(command, stdin=read, start_new_session=True)
        os.close(read)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def begin(self) -> None:
        """Count from now, without a signal: what is left to do may hang."""
        os.write(self._write, bytes([signal.SIGTERM]))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self._write)
        self._watch.wait()
