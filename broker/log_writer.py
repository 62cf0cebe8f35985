"""Log lines leave in a thread of their own, so that whoever reads them cannot hold the program."""

from __future__ import annotations

import logging
import os
import queue
import select
import threading

#: Lines that wait for a reader; with what a pipe holds, some seconds of a busy process.
MOST_LINES = 10_000
#: How long the end of the process waits for the last lines to be taken.
_LAST_LINES_S = 1.0


class LogWriter(logging.Handler):
    """Writes lines to a file descriptor. A reader that stands still costs lines, never the caller.

    At most ``most_lines`` wait. Those beyond are left out and counted, and the count is said in the
    event ``lines_left_out`` once there is room again.
    """

    def __init__(self, descriptor: int, most_lines: int = MOST_LINES) -> None:
        super().__init__()
        self._descriptor, self._most_lines = descriptor, most_lines
        self._left_out = 0
        self._ended = False
        self._begin()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._ended or self._process != os.getpid():
                self._begin()  # a fork has the lines, and no thread to write them
            if self._left_out and not self._lines.full():
                self._note("lines_left_out", self._left_out)
                self._left_out = 0
            self._lines.put_nowait(self._encoded(record))
        except queue.Full:
            self._left_out += 1
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Wait for the lines to be taken, for a second at most."""
        lines = self._lines
        with lines.all_tasks_done:
            lines.all_tasks_done.wait_for(lambda: not lines.unfinished_tasks, _LAST_LINES_S)

    def close(self) -> None:
        """End the thread; a line that comes after this begins another, since a library that
        configures logging closes the handlers of all.
        """
        self.flush()
        if not self._ended and not self._lines.full():
            self._ended = True
            self._lines.put_nowait(b"")
        super().close()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._ended = False
        self._lines: queue.Queue[bytes] = queue.Queue(self._most_lines)
        writing = threading.Thread(
            target=_write, args=(self._lines, self._descriptor), name="log-writer", daemon=True
        )
        writing.start()

    def _note(self, event: str, count: int) -> None:
        record = logging.LogRecord("draftmq", logging.WARNING, "", 0, event, None, None)
        record.fields = {"count": count}
        self._lines.put_nowait(self._encoded(record))

    def _encoded(self, record: logging.LogRecord) -> bytes:
        return self.format(record).encode(errors="backslashreplace") + b"\n"


def _write(lines: queue.Queue[bytes], descriptor: int) -> None:
    """Write until an empty line; no lock is held while it waits, so the process may end."""
    while octets := lines.get():
        try:
            while octets:
                octets = octets[_some(descriptor, octets) :]
        except OSError:
            pass  # nobody reads any more
        lines.task_done()


def _some(descriptor: int, octets: bytes) -> int:
    try:
        return os.write(descriptor, octets)
    except BlockingIOError:
        select.select((), (descriptor,), ())
        return 0
