"""How far reading is: a bar where somebody looks at a terminal, lines in the log elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from broker.logs import log
from trainer_client.data.building import Progress

_logger = logging.getLogger("draftmq.data")
#: What is done sooner says nothing; a log gets a line as often.
_EVERY_S = 5.0


class ReadingProgress:
    """Shown only where reading takes long; used as a block, and by one process of a node: the one
    that reads. ``quiet`` is for output that a program reads.
    """

    def __init__(self, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = [TextColumn("tokenizing"), BarColumn(), TimeRemainingColumn()]
        shown = TextColumn("{task.fields[shown]}")
        self._bar = Bar(*columns, shown, console=Console(stderr=True))
        self._bar.disable = quiet or not self._bar.console.is_terminal
        self._clock = clock
        self._began = self._said = clock()

    def __enter__(self) -> ReadingProgress:
        self._began = self._said = self._clock()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def told(self, progress: Progress) -> None:
        """A part is read."""
        now = self._clock()
        rate = round(progress.tokens / max(1e-9, now - self._began))
        if not self._bar.disable:
            if not self._bar.tasks:
                self._bar.start()
                self._bar.add_task("", total=progress.total_bytes, shown="")
            shown = f"{progress.tokens:,} tokens, {rate:,} a second"
            self._bar.update(self._bar.task_ids[0], completed=progress.done_bytes, shown=shown)
        elif now - self._said >= _EVERY_S:
            self._said = now
            share = progress.done_bytes / max(1, progress.total_bytes)
            left_s = (now - self._began) * (1 - share) / max(1e-9, share)
            fields = {
                "done": f"{share:.0%}",
                "samples": progress.samples,
                "tokens": progress.tokens,
                "tokens_per_s": rate,
                "left_s": round(left_s),
            }
            log(_logger, "info", "tokenizing", fields)

    def waits(self) -> None:
        """Another process reads the same data."""
        log(_logger, "info", "tokenized_elsewhere", {})
