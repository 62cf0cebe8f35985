from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from broker.protocol import encode
from broker.protocol import messages as m
from broker.service import Broker
from trainer_client.core import Deliver
from trainer_client.errors import TrainerClientError
from trainer_client.service import Client
from trainer_client.trace import Trace
from trainer_client.watch.observed import Observed
from worker.service import Worker
from worker.targets.stub import StubTarget

#: How far the other host's clock is ahead in these tests.
AHEAD_S = 1000.0


def deliver(number: int, submitted: float, sent: float, arrived: float, **reply: Any) -> Deliver:
    request_id = m.RequestId("c", 1, number)
    request = m.Request(request_id, "generate", "", 5, 64, "", "probs", 60.0, ())
    fields: dict[str, Any] = {"compute_s": 0.5, "info_json": '{"waited_s": 0.25}'} | reply
    packet = encode(
        m.Reply(
            id=request_id,
            worker="w",
            model="tiny",
            fingerprint="f0",
            aux_layer_ids=(1, 3, 4),
            tokens_hash=0,
            mapping_id="",
            encoding="probs",
            manifest=(),
            **fields,
        )
    )
    return Deliver(request_id, packet, request, submitted, sent, arrived)


def seen(number: int, accepted: float, assigned: float, answered: float) -> dict[str, Any]:
    """A request as a broker whose clock is ahead saw it."""
    times = {"accepted_at": accepted, "assigned_at": assigned, "answered_at": answered}
    ahead = {name: at + AHEAD_S for name, at in times.items()}
    return {"id": {"client": "c", "incarnation": 1, "number": number}, "worker": "w", **ahead}


def spans(chrome: dict[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """Process -> name of a span -> when it began and ended, in seconds from the first."""
    processes = {
        event["pid"]: event["args"]["name"]
        for event in chrome["traceEvents"]
        if event["name"] == "process_name"
    }
    found: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for event in chrome["traceEvents"]:
        if event["ph"] == "X":
            begin, length = event["ts"] / 1e6, event["dur"] / 1e6
            found[processes[event["pid"]]][event["name"]] = (begin, begin + length)
    return found


def assert_nested(chrome: dict[str, Any]) -> None:
    """Of two spans in one row, either one holds the other or they do not touch; as Chrome wants."""
    rows: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in json.loads(json.dumps(chrome))["traceEvents"]:
        if event["ph"] == "X":
            assert event["dur"] >= 0 <= event["ts"]
            rows[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    near = 0.01  # µs: what is left of rounding
    for row in rows.values():
        for number, (begin, end) in enumerate(row):
            for other_begin, other_end in row[number + 1 :]:
                apart = other_begin >= end - near or other_end <= begin + near
                within = begin - near <= other_begin and other_end <= end + near
                assert apart or within, f"{(begin, end)} and {(other_begin, other_end)}"


def test_a_request_is_seen_in_all_three_processes_on_one_clock() -> None:
    trace = Trace("trainer")
    trace.delivered(deliver(1, 10.0, 10.5, 14.5), 15.0)
    broker = {"broker": "b", "requests": [seen(1, 11.0, 12.0, 14.0)]}
    chrome = trace.chrome([broker])
    assert_nested(chrome)
    at = spans(chrome)
    assert at["trainer"]["generate 1"] == (0.0, 5.0)
    assert at["trainer"]["waiting for a window"] == (0.0, 0.5)
    assert at["trainer"]["away"] == (0.5, 4.5)
    assert at["broker b"]["queued"] == (1.0, 2.0)
    assert at["broker b"]["with worker w"] == (2.0, 4.0)
    # 0.75 s of work in the middle of the 2 s that the worker had it
    assert at["worker w"]["waiting"] == (2.625, 2.875)
    assert at["worker w"]["computing"] == (2.875, 3.375)
    said = {e["name"]: e["args"].get("placed_within_ms") for e in chrome["traceEvents"]}
    assert (said["computing"], said["queued"], said["away"]) == (625.0, None, None)


def test_the_tightest_requests_set_the_brokers_clock() -> None:
    trace = Trace("trainer")
    trace.delivered(deliver(1, 10.0, 10.0, 19.0), 19.0)
    trace.delivered(deliver(2, 10.0, 10.0, 14.0), 14.0)
    # the first was long on its way back, the second long on its way there: 0.1 s is the shortest
    requests = [seen(1, 10.1, 11.0, 13.0), seen(2, 12.0, 12.5, 13.9)]
    at = spans(trace.chrome([{"broker": "b", "requests": requests}]))
    begin, end = at["broker b"]["generate 1"]
    assert (begin, end) == pytest.approx((0.1, 3.0), abs=1e-5)


def test_without_the_brokers_times_a_worker_is_placed_between_sent_and_arrived() -> None:
    trace = Trace("trainer")
    trace.delivered(deliver(1, 10.0, 11.0, 14.0), 14.0)
    for brokers in ([], [{"broker": "b", "requests": [seen(9, 1.0, 2.0, 3.0)]}]):
        at = spans(trace.chrome(brokers))
        assert set(at) == {"trainer", "worker w"}
        assert at["worker w"]["generate 1"] == (2.125, 2.875)


def test_requests_under_way_at_once_have_rows_of_their_own() -> None:
    trace = Trace("trainer")
    for number in range(1, 6):
        start = 10.0 + number
        trace.delivered(deliver(number, start, start, start + 2.5), start + 2.5)
    chrome = trace.chrome()
    assert_nested(chrome)
    rows = {e["args"]["name"] for e in chrome["traceEvents"] if e["name"] == "thread_name"}
    assert rows == {"requests", "requests 2", "requests 3"}


def test_training_steps_are_shown_one_after_the_other() -> None:
    trace = Trace("trainer")
    trace.step(1, seconds=1.0, now=11.0, loss=2.0)
    trace.step(2, seconds=1.5, now=12.25, loss=1.5)  # told of a little late
    chrome = trace.chrome()
    assert_nested(chrome)
    assert spans(chrome)["trainer"] == {"step 1": (0.0, 1.0), "step 2": (1.0, 2.25)}


def test_only_the_last_requests_are_kept() -> None:
    trace = Trace("trainer", kept=2)
    for number in (1, 2, 3):
        trace.delivered(deliver(number, number, number, number + 1.0), number + 1.0)
    names = set(spans(trace.chrome())["trainer"])
    assert {"generate 2", "generate 3"} <= names
    assert "generate 1" not in names


@pytest.mark.parametrize(
    "info", ["", "no json", "[]", "{}", '{"waited_s": -1.0}', '{"waited_s": "x"}', '"x"']
)
def test_a_worker_that_says_nothing_of_use_has_not_waited(info: str) -> None:
    trace = Trace("trainer")
    trace.delivered(deliver(1, 10.0, 10.0, 14.0, info_json=info), 14.0)
    begin, end = spans(trace.chrome())["worker w"]["waiting"]
    assert begin == end


def test_a_worker_that_claims_more_time_than_there_was_breaks_nothing() -> None:
    trace = Trace("trainer")
    claims = {"compute_s": 99.0, "info_json": json.dumps({"waited_s": math.inf})}
    trace.delivered(deliver(1, 10.0, 10.0, 14.0, **claims), 14.0)
    assert_nested(trace.chrome())


def test_an_empty_trace_is_a_trace() -> None:
    assert Trace("trainer").chrome()["traceEvents"] == []


def test_real_requests_are_nested_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    observed = Observed(0, None, path, [])
    trace = observed.trace
    with (
        Broker(http="127.0.0.1:0") as broker,
        Worker(StubTarget(), broker.worker_endpoint, name="w"),
        Client([broker.client_endpoint], trace=trace) as client,
    ):
        asked = [client.submit("input_embeddings", timeout_s=20.0) for _ in range(4)]
        for pending in asked:
            pending.result(20.0)
        client.close()  # what is delivered last is noted after its result is set
        assert trace is not None
        trace.write(path, [broker.trace()])
    chrome = json.loads(path.read_text())
    assert_nested(chrome)
    at = spans(chrome)
    (seen_by_broker,) = (found for process, found in at.items() if process.startswith("broker"))
    for number in range(1, 5):
        name = f"input_embeddings {number}"
        ours, theirs, worker = (
            at["trainer rank 0"][name],
            seen_by_broker[name],
            at["worker w"][name],
        )
        assert ours[0] <= theirs[0] <= worker[0] <= worker[1] <= theirs[1] <= ours[1]


def test_a_broker_that_cannot_be_asked_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "deep" / "trace.json"
    observed = Observed(1, None, path, ["127.0.0.1:1"])
    with caplog.at_level(logging.WARNING), observed.of(None):  # type: ignore[arg-type]
        assert observed.trace is not None
        observed.trace.delivered(deliver(1, 10.0, 10.0, 14.0), 14.0)
    assert [record.message for record in caplog.records] == ["trace_without_broker"]
    assert_nested(json.loads(path.with_stem("trace-rank1").read_text()))


def test_a_trace_that_cannot_be_written_is_said_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainerClientError, match="cannot write the trace"):
        Observed(0, None, tmp_path / "file" / "trace.json", [])
