"""What can be watched of a training process: its metrics over HTTP, and a trace at the end."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from broker.errors import BrokerError
from broker.logs import log
from broker.watch.look import fetch
from trainer_client.errors import TrainerClientError
from trainer_client.trace import Trace
from trainer_client.watch.metrics import TrainerMeasures, served

if TYPE_CHECKING:
    from trainer_client.targets.remote import RemoteEagle3TargetModel
    from trainer_client.training.trainer import StepMetrics

_logger = logging.getLogger("draftmq.client")


class Observed:
    """One rank as others see it: on ``http`` while it trains, in the file ``trace`` afterwards.

    ``brokers`` are the HTTP addresses of those whose times belong in the trace. ``http_token``
    says who may look, as in :func:`trainer_client.watch.metrics.served`, and is shown to the
    brokers. Raises :class:`TrainerClientError` at once where the file cannot be written.
    """

    def __init__(
        self,
        rank: int,
        http: str | None,
        trace: Path | None,
        brokers: Sequence[str],
        *,
        http_token: str | Path | None = None,
    ) -> None:
        self.rank = rank
        self.trace = Trace(f"trainer rank {rank}") if trace is not None else None
        self.measures = TrainerMeasures()
        self._http = http
        self._http_token = http_token
        self._brokers = brokers
        #: the first rank's file is as asked for, the others' say their rank
        self._path = trace.with_stem(f"{trace.stem}-rank{rank}") if trace and rank else trace
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.touch()
            except OSError as error:
                raise TrainerClientError(f"cannot write the trace: {error}") from error

    def step(self, step: StepMetrics) -> None:
        """An optimizer step is done."""
        self.measures.step(step)
        if self.trace is not None:
            shown = {"loss": step.loss, "waiting_share": step.waiting_share}
            self.trace.step(step.step, step.seconds, time.monotonic(), **shown)

    @contextlib.contextmanager
    def of(self, target: RemoteEagle3TargetModel) -> Iterator[None]:
        """Watch a training run that asks this target; however it ends, the trace is written."""
        with served(
            self._http,
            self.rank,
            lambda: target.snapshot() | {"training": self.measures.plain()},
            http_token=self._http_token,
        ) as address:
            if address is not None:
                log(_logger, "info", "listening", {"http": address, "rank": self.rank})
            try:
                yield
            finally:
                self._write_trace()

    def _write_trace(self) -> None:
        if self.trace is None or self._path is None:
            return
        seen = []
        token = self._http_token if isinstance(self._http_token, Path) else None
        for address in self._brokers:
            try:
                seen.append(fetch(address, "/trace", token))
            except BrokerError as error:
                log(_logger, "warning", "trace_without_broker", {"error": str(error)})
        try:
            self.trace.write(self._path, seen)
        except OSError as error:  # the run is worth more than its trace
            log(_logger, "warning", "trace_not_written", {"error": str(error)})
