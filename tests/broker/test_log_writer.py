"""Whoever reads the log may stand still: lines are left out, and the program goes on."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

from broker.log_writer import LogWriter
from broker.logs import _Formatter
from tests.waiting import eventually


def writer(most_lines: int) -> tuple[int, LogWriter]:
    reading, writing = os.pipe()
    handler = LogWriter(writing, most_lines)
    handler.setFormatter(_Formatter("logfmt"))
    return reading, handler


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("draftmq.test", logging.INFO, "", 0, text, None, None)


def test_lines_come_whole_and_in_order() -> None:
    reading, handler = writer(100)
    for number in range(50):
        handler.emit(record(f"event_{number}"))
    handler.close()
    lines = os.read(reading, 1 << 16).decode().splitlines()
    assert [line.rpartition("event=")[2] for line in lines] == [f"event_{n}" for n in range(50)]


def test_a_reader_that_stands_still_costs_lines_and_they_are_counted() -> None:
    reading, handler = writer(10)
    wide = "x" * 4096
    for _ in range(200):  # a pipe takes 64 KiB
        handler.handle(record(wide))
    got = bytearray()

    def read_on() -> bool:
        got.extend(os.read(reading, 1 << 16))
        handler.handle(record("later"))
        return b"event=later" in got

    eventually(read_on)
    whole = bytes(got).decode()
    counts = [line.rpartition("count=")[2] for line in whole.splitlines() if "left_out" in line]
    assert whole.count(wide) + sum(map(int, counts)) >= 200
    assert whole.count(wide) < 200


def test_a_process_ends_while_nobody_reads_its_log() -> None:
    program = (
        "import logging; from broker.logs import configure; configure();\n"
        "for _ in range(5000): logging.getLogger('draftmq').info('x' * 200)\n"
    )
    reading, writing = os.pipe()
    try:
        done = subprocess.run([sys.executable, "-c", program], stderr=writing, timeout=60)
    finally:
        os.close(reading)
        os.close(writing)
    assert done.returncode == 0


def test_a_fork_writes_lines_of_its_own() -> None:
    program = (
        "import logging, os; from broker.logs import configure; configure()\n"
        "log = logging.getLogger('draftmq'); log.info('before')\n"
        "if not os.fork(): log.info('child'); logging.shutdown(); os._exit(0)\n"
        "os.wait(); log.info('parent')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert {line.rpartition("event=")[2] for line in done.stderr.splitlines()} == {
        "before",
        "child",
        "parent",
    }


def test_lines_that_come_after_a_library_closed_all_handlers_are_written() -> None:
    """``logging.config.dictConfig`` closes every handler of the process, whoever made it."""
    reading, handler = writer(100)
    for text in ("before", "after", "again"):
        handler.emit(record(text))
        handler.close()
        assert os.read(reading, 1 << 16).decode().rstrip().endswith(f"event={text}")
    handler.close()
