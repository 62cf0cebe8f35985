"""Blocks to parts on all cores: processes that load a tokenizer and no torch.

Each is ``python -m trainer_client.data.pool``, fed through its standard input by a thread here. It
ends when that is closed, also where this process was killed. Forking was not chosen: a trainer has
threads of torch, ZeroMQ and the tokenizer, and connections that a child would keep open; and what
``multiprocessing`` spawns imports the main module, with torch, once more each.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from trainer_client.data.files import Block
from trainer_client.data.reading import Options, Reader
from trainer_client.data.samples import Part
from trainer_client.errors import DataError

#: Blocks under way for each process: one that it works on, and one that waits.
_DEEP = 2


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def one_by_one(
    tokenizer: Any, options: Options, blocks: Iterable[tuple[Block, int]]
) -> Iterator[tuple[Block, Part]]:
    """Each block of a file with this number, and its part, in this process."""
    reader = Reader(tokenizer, options)
    for block, file in blocks:
        yield block, reader.read(block, file)


def on_all_cores(
    tokenizer: Any, options: Options, blocks: Iterable[tuple[Block, int]]
) -> Iterator[tuple[Block, Part]]:
    """The same in the same order, by a process for each core; a bounded number is under way.

    Raises :class:`DataError` where a process dies.
    """
    try:
        what = pickle.dumps((tokenizer, options))
    except Exception:  # a tokenizer with something that no other process can have
        yield from one_by_one(tokenizer, options, blocks)
        return
    count = cores()
    children: queue.SimpleQueue[_Child] = queue.SimpleQueue()
    every = [_Child(what) for _ in range(count)]
    for child in every:
        children.put(child)

    def work(block: Block, file: int) -> Part:
        child = children.get()  # as many threads as children: one is always there
        try:
            return child.read(block, file)
        finally:
            children.put(child)

    threads = ThreadPoolExecutor(count, "draftmq-tokenizing")
    waiting: deque[tuple[Block, Future[Part]]] = deque()
    try:
        for block, file in blocks:
            waiting.append((block.without_content(), threads.submit(work, block, file)))
            if len(waiting) >= _DEEP * count:
                first, done = waiting.popleft()
                yield first, done.result()
        while waiting:
            first, done = waiting.popleft()
            yield first, done.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for child in every:
            child.end()
        threads.shutdown()


class _Child:
    """A process that makes parts, as the thread that feeds it sees it."""

    def __init__(self, what: bytes) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "TOKENIZERS_PARALLELISM": "false",  # there is a process for each core
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainer_client.data.pool"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C comes to the trainer alone
        )
        self._what: bytes | None = what

    def read(self, block: Block, file: int) -> Part:
        into, out = self._process.stdin, self._process.stdout
        assert into is not None
        assert out is not None
        try:
            if self._what is not None:
                into.write(self._what)
                self._what = None
            pickle.dump((block, file), into, pickle.HIGHEST_PROTOCOL)
            into.flush()
            answer = pickle.load(out)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            code = self._process.poll()
            raise DataError(
                f"a process that tokenized {block.path} died (exit status {code}); was it killed "
                "for its memory? (the log has what it said)"
            ) from None
        if isinstance(answer, str):
            raise DataError(f"tokenizing {block.path} failed: {answer}")
        part: Part = answer
        return part

    def end(self) -> None:
        """It has nothing that could be lost."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was not flushed has nobody to read it
                    stream.close()


def main() -> None:
    """Make parts of the blocks that come in, until no more do."""
    into, out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    tokenizer, options = pickle.load(into)
    reader = Reader(tokenizer, options)
    while True:
        try:
            block, file = pickle.load(into)
        except EOFError:
            return
        try:
            answer: Part | str = reader.read(block, file)
        except DataError as error:
            answer = str(error)
        except Exception:
            answer = traceback.format_exc()
        pickle.dump(answer, out, pickle.HIGHEST_PROTOCOL)
        out.flush()


if __name__ == "__main__":
    main()
