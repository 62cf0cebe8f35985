from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from broker.protocol import Limits, encode
from broker.protocol import messages as m
from tests.worker.core.test_machine import Rig
from worker.answers import Answerer
from worker.core import Compute
from worker.errors import WorkerError
from worker.metrics import WorkerMeasures
from worker.service import Worker
from worker.targets.contract import describe
from worker.targets.stub import StubTarget

NOBODY = "ipc:///tmp/draftmq-no-broker-is-here"


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker(StubTarget(), NOBODY, name="w", http="127.0.0.1:0") as running:
        yield running


def get(worker: Worker, path: str) -> str:
    with urllib.request.urlopen(f"http://{worker.http_address}{path}", timeout=10) as response:
        return str(response.read().decode())


def asked(operation: str) -> m.Request:
    fields = (m.RequestId("c", 1, 1), operation, "", 1, 100, "", "probs", 60.0, ())
    return m.Request(*fields)


def test_a_workers_metrics_are_served_before_any_broker_is_there(worker: Worker) -> None:
    assert get(worker, "/healthz") == "ok\n"
    status = json.loads(get(worker, "/status"))
    assert (status["worker"], status["held"], list(status["brokers"])) == ("w", 0, [NOBODY])
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(get(worker, "/metrics"))
        for sample in family.samples
    }
    assert samples["draftmq_worker_replies_total",] == 0
    assert samples["draftmq_worker_computing",] == 0
    assert samples["draftmq_worker_broker_attached", NOBODY] == 0
    assert samples["draftmq_worker_wait_seconds_bucket", "+Inf"] == 0
    assert samples["process_resident_memory_bytes",] > 0


def test_an_http_address_that_is_taken_is_the_workers_error(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="cannot serve HTTP"):
        Worker(StubTarget(), NOBODY, http=worker.http_address).start()


def test_answers_are_measured() -> None:
    measures = WorkerMeasures()
    request = encode(asked("generate"))
    reply = m.Reply(request.message.id, "w", "t", "f", (), 0, "", "probs", 0.5, "", ())  # type: ignore[union-attr]
    measures.computed = 3
    measures.answered(request, [encode(reply)], 2.0, 0.5)
    failure = encode(m.Failure(reply.id, "bad_request", "as planned"))
    measures.answered(request, [failure], 3.0, 0.25)
    seen = measures.plain()
    assert (seen["replies"], seen["tokens"], seen["failures"]) == (1, 100, {"bad_request": 1})
    assert (seen["wait_s"]["sum"], seen["compute_s"]["sum"]) == (5.0, 0.5)
    assert (seen["busy_s"], seen["staged"]) == (0.75, 1)
    assert seen["request_bytes"] == 2 * request.nbytes
    assert seen["answer_bytes"] == encode(reply).nbytes + failure.nbytes


def test_a_request_is_computed_with_the_time_of_its_arrival() -> None:
    rig = Rig()
    rig.welcome()
    first = rig.request(1)
    rig.now += 1.0
    rig.request(2)
    rig.now += 1.0
    rig.computed(first)
    times = [action.received_at for action in rig.done if isinstance(action, Compute)]
    assert times == [100.0, 101.0]


def test_a_reply_says_how_long_its_request_has_waited() -> None:
    target = StubTarget()
    answerer = Answerer(target, describe(target), "w")
    (answer,) = answerer.answer(encode(asked("input_embeddings")), Limits(), waited_s=0.25)
    assert isinstance(answer.message, m.Reply)
    assert json.loads(answer.message.info_json) == {"waited_s": 0.25}
    (info,) = answerer.answer(encode(asked("model_info")), Limits(), waited_s=0.25)
    assert isinstance(info.message, m.Reply)
    assert "vocab_size" in json.loads(info.message.info_json)
