"""Where the last requests spent their time, in all three processes, as a Chrome trace.

The file opens in Perfetto and ``chrome://tracing``. Hosts have clocks of their own. The broker's is
put on the trainer's by what must hold of every request: it is accepted after it was sent, and its
reply arrives after it was answered. Each gives a bound for the difference of the two clocks; the
middle of the tightest pair is taken, as NTP does (Mills, RFC 5905) with its one request. A worker
says only durations, which are put into the middle of the time that the broker saw it have the
request; ``placed_within_ms`` says how far off that may be, either way.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker.protocol import messages as m
from trainer_client.core import Deliver

#: As many as a broker remembers.
_KEPT = 4096
#: What ``/trace`` of a broker shows.
Seen = Mapping[str, Any]
_Key = tuple[str, int, int]
_Inner = tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class _Span:
    """Something that took time, in monotonic seconds of this process."""

    process: str
    track: str
    name: str
    began: float
    ended: float
    args: dict[str, Any] = field(default_factory=dict)
    inner: _Inner = ()


@dataclass(frozen=True)
class _Passed:
    """One request that was replied to, as this process saw it."""

    request: m.Request
    reply: m.Reply
    submitted_at: float
    sent_at: float
    arrived_at: float
    delivered_at: float


class Trace:
    """Keeps the times of a client's last ``kept`` requests, and of as many training steps."""

    def __init__(self, name: str, kept: int = _KEPT) -> None:
        self.name = name
        self._passed: deque[_Passed] = deque(maxlen=kept)
        self._steps: deque[_Span] = deque(maxlen=kept)

    def delivered(self, answer: Deliver, now: float) -> None:
        """A reply is in the caller's hands."""
        reply = answer.packet.message
        assert isinstance(reply, m.Reply)
        times = (answer.submitted_at, answer.sent_at, answer.arrived_at, now)
        self._passed.append(_Passed(answer.request, reply, *times))

    def step(self, number: int, seconds: float, now: float, **args: Any) -> None:
        """A training step ended ``now``."""
        began = now - seconds
        if self._steps:
            began = max(began, self._steps[-1].ended)
        self._steps.append(_Span(self.name, "steps", f"step {number}", began, now, args))

    def chrome(self, brokers: Iterable[Seen] = ()) -> dict[str, Any]:
        """The trace as Chrome reads it; ``brokers`` are their ``/trace``, where there is one."""
        passed = list(self._passed)
        seen = _on_our_clock(passed, brokers)
        spans = list(self._steps)
        for one in passed:
            spans += _spans(self.name, one, seen.get(_key(one.request.id)))
        return {"traceEvents": _events(spans), "displayTimeUnit": "ms"}

    def write(self, path: Path, brokers: Iterable[Seen] = ()) -> None:
        """Write the trace as JSON."""
        path.write_text(json.dumps(self.chrome(brokers)), encoding="utf-8")


@dataclass(frozen=True)
class _AtBroker:
    broker: str
    worker: str
    accepted_at: float
    assigned_at: float
    answered_at: float


def _key(request_id: m.RequestId) -> _Key:
    return request_id.client, request_id.incarnation, request_id.number


def _on_our_clock(passed: Sequence[_Passed], brokers: Iterable[Seen]) -> dict[_Key, _AtBroker]:
    """What the brokers saw of these requests, each broker's clock set to ours."""
    ours = {_key(one.request.id): one for one in passed}
    found: dict[_Key, _AtBroker] = {}
    for broker in brokers:
        theirs = {
            key: record
            for record in broker["requests"]
            if (
                key := (record["id"]["client"], record["id"]["incarnation"], record["id"]["number"])
            )
            in ours
        }
        if not theirs:
            continue
        most = min(at["accepted_at"] - ours[key].sent_at for key, at in theirs.items())
        least = max(at["answered_at"] - ours[key].arrived_at for key, at in theirs.items())
        ahead_s = (least + most) / 2
        for key, at in theirs.items():
            times = (at[name] - ahead_s for name in ("accepted_at", "assigned_at", "answered_at"))
            found[key] = _AtBroker(f"broker {broker['broker']}", at["worker"], *times)
    return found


def _spans(trainer: str, one: _Passed, at: _AtBroker | None) -> list[_Span]:
    name = f"{one.request.operation} {one.request.id.number}"
    args = {
        "request": str(one.request.id),
        "step": one.request.step,
        "tokens": one.request.n_tokens,
        "encoding": one.reply.encoding,
        "reply_bytes": one.reply.tensor_bytes,
    }
    inner: _Inner = (
        ("waiting for a window", one.submitted_at, one.sent_at),
        ("away", one.sent_at, one.arrived_at),
        ("delivery", one.arrived_at, one.delivered_at),
    )
    spans = [_Span(trainer, "requests", name, one.submitted_at, one.delivered_at, args, inner)]
    begin, end = one.sent_at, one.arrived_at
    if at is not None:
        begin, end = at.assigned_at, at.answered_at
        inner = (
            ("queued", at.accepted_at, at.assigned_at),
            (f"with worker {at.worker}", at.assigned_at, at.answered_at),
        )
        spans.append(
            _Span(at.broker, "requests", name, at.accepted_at, at.answered_at, args, inner)
        )
    waited_s, compute_s = _waited_s(one.reply), max(0.0, one.reply.compute_s)
    slack_s = max(0.0, end - begin - waited_s - compute_s)
    received_at = begin + slack_s / 2
    computing_at = received_at + waited_s
    ended_at = computing_at + compute_s
    args = args | {"placed_within_ms": 500 * slack_s}
    inner = (("waiting", received_at, computing_at), ("computing", computing_at, ended_at))
    worker = f"worker {one.reply.worker}"
    return [*spans, _Span(worker, "requests", name, received_at, ended_at, args, inner)]


def _waited_s(reply: m.Reply) -> float:
    """How long the worker says that the request waited there; 0 where it says nothing of use."""
    try:
        waited = json.loads(reply.info_json)["waited_s"]
    except (ValueError, KeyError, TypeError):
        return 0.0
    return waited if isinstance(waited, float) and 0 <= waited < math.inf else 0.0


def _events(spans: Iterable[_Span]) -> list[dict[str, Any]]:
    """Spans as complete events; those of one track that overlap get rows of their own."""
    spans = sorted(spans, key=lambda span: (span.began, span.ended))
    zero = min((span.began for span in spans), default=0.0)
    processes: dict[str, int] = {}
    #: (process, track) -> when the last span of each of its rows ends
    rows: dict[tuple[str, str], list[float]] = {}
    threads: dict[tuple[str, str, int], int] = {}
    events: list[dict[str, Any]] = []
    for span in spans:
        pid = processes.setdefault(span.process, len(processes) + 1)
        ends = rows.setdefault((span.process, span.track), [])
        row = next((n for n, end in enumerate(ends) if end <= span.began), len(ends))
        ends[row : row + 1] = [span.ended]
        tid = threads.setdefault((span.process, span.track, row), len(threads) + 1)
        for name, began, ended in ((span.name, span.began, span.ended), *span.inner):
            began_us, ended_us = (round(1e6 * (at - zero), 3) for at in (began, ended))
            events.append(
                {
                    "ph": "X",
                    "cat": span.track,
                    "name": name,
                    "pid": pid,
                    "tid": tid,
                    "ts": began_us,
                    "dur": round(ended_us - began_us, 3),
                    "args": span.args,
                }
            )
    names = [_named("process_name", pid, 0, name) for name, pid in processes.items()]
    names += [
        _named("thread_name", processes[process], tid, f"{track} {row + 1}" if row else track)
        for (process, track, row), tid in threads.items()
    ]
    return names + events


def _named(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}
