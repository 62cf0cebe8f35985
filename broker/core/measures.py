"""What the broker measures of each model's requests, and what it remembers of the last ones."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from broker.core.state import Entry, WorkerSession
from broker.histogram import Histogram
from broker.protocol.messages import RequestId

#: Requests whose times are kept for a trace; about 1 MB.
_REMEMBERED = 4096
#: Models that are measured while they are served: names come from workers, and nobody has so many.
_MAX_MODELS = 64
#: Models that nobody serves any more whose measures are still shown.
_MAX_GONE = 8


@dataclass(frozen=True, slots=True)
class Times:
    """When one request passed through here; monotonic seconds of this broker."""

    id: RequestId
    worker: str
    accepted_at: float
    assigned_at: float
    answered_at: float


@dataclass(eq=False)
class ModelMeasures:
    """Measures one model's requests since this broker began."""

    #: from acceptance to the first worker
    queue_wait_s: Histogram = field(default_factory=Histogram)
    #: from a worker's assignment to its reply: transfers, waiting behind others there, computing
    service_s: Histogram = field(default_factory=Histogram)
    #: computing, as the worker says
    compute_s: Histogram = field(default_factory=Histogram)
    #: tokens (B*T) of the requests that were replied to
    tokens: int = 0


class Measures:
    """The core tells it of each assignment and each reply."""

    def __init__(self) -> None:
        self.models: dict[str, ModelMeasures] = {}
        #: those of them that nobody serves any more, the first to go first
        self._gone: dict[str, None] = {}
        self.last: deque[Times] = deque(maxlen=_REMEMBERED)

    def _of(self, model: str) -> ModelMeasures:
        """The measures of a model; of too many at once, the first are forgotten."""
        self._gone.pop(model, None)
        if model not in self.models:
            while len(self.models) >= _MAX_MODELS:
                self._forget(next(iter(self._gone or self.models)))
            self.models[model] = ModelMeasures()
        return self.models[model]

    def left(self, model: str) -> None:
        """Nobody serves this model any more; the last few of these are remembered."""
        if model in self.models:
            self._gone[model] = None
            if len(self._gone) > _MAX_GONE:
                self._forget(next(iter(self._gone)))

    def _forget(self, model: str) -> None:
        self._gone.pop(model, None)
        del self.models[model]

    def validate(self) -> None:
        """Check every invariant; raises ``AssertionError``."""
        assert self._gone.keys() <= self.models.keys()
        assert len(self.models) <= _MAX_MODELS
        assert len(self._gone) <= _MAX_GONE

    def assigned(self, entry: Entry, worker: WorkerSession, now: float) -> None:
        """A worker is given the entry; only its first wait counts."""
        if not entry.workers and not entry.failed_on:
            self._of(worker.model).queue_wait_s.observe(now - entry.accepted_at)

    def replied(
        self, entry: Entry, worker: WorkerSession, since: float, compute_s: float, now: float
    ) -> None:
        """The entry's reply came from the worker that has had it ``since``."""
        model = self._of(worker.model)
        model.service_s.observe(now - since)
        model.compute_s.observe(max(0.0, compute_s))
        model.tokens += entry.n_tokens
        self.last.append(Times(entry.id, worker.id, entry.accepted_at, since, now))
