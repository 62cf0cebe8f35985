from __future__ import annotations

import urllib.request
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from broker.service import Broker
from trainer_client.errors import TrainerClientError
from trainer_client.service import Client
from trainer_client.training.trainer import StepMetrics
from trainer_client.watch.metrics import TrainerMeasures, served
from worker.service import Worker
from worker.targets.stub import StubTarget


def step(number: int, **changes: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "loss": 2.0,
        "depth_accuracy": [0.5],
        "accept_length": 1.5,
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "tokens_per_s": 50.0,
        "waiting_share": 0.25,
        "seconds": 2.0,
    }
    return StepMetrics(step=number, **(values | changes))


def samples(address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {
        ",".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_clients_requests_and_the_steps_are_exposed() -> None:
    measures = TrainerMeasures()
    with (
        Broker() as broker,
        Worker(StubTarget(), broker.worker_endpoint),
        Client([broker.client_endpoint]) as client,
        served(
            "127.0.0.1:0", 3, lambda: client.snapshot() | {"training": measures.plain()}
        ) as address,
    ):
        assert address is not None
        before = samples(address)
        client.submit("input_embeddings", timeout_s=20.0).result(20.0)
        for number in (1, 2):
            measures.step(step(number))
        client.close()
        after = samples(address)
    assert before["draftmq_trainer_requests_total"] == 0
    assert "draftmq_trainer_loss" not in before
    assert after["draftmq_trainer_requests_total"] == 1
    assert after["draftmq_trainer_reply_seconds_count"] == 1
    assert after["draftmq_trainer_reply_bytes_total"] > 0
    assert after["draftmq_trainer_unfinished"] == 0
    assert f"draftmq_trainer_broker_attached,{broker.client_endpoint}" in after
    assert after["draftmq_trainer_step_seconds_sum"] == 4.0
    assert after["draftmq_trainer_waited_seconds_total"] == 1.0
    assert after["draftmq_trainer_tokens_total"] == 200.0
    assert (after["draftmq_trainer_step"], after["draftmq_trainer_loss"]) == (2, 2.0)


def test_each_rank_has_the_port_of_its_own() -> None:
    with served("127.0.0.1:0", 0, dict) as first:
        assert first is not None
        host, _, port = first.rpartition(":")
        taken = f"{host}:{int(port) - 5}"
        with pytest.raises(TrainerClientError, match=f"cannot serve HTTP on '{first}'"):
            served(taken, 5, dict).__enter__()


@pytest.mark.parametrize("address", ["9555", ":9555", "127.0.0.1:", "127.0.0.1:x"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(TrainerClientError, match="is no address"), served(address, 0, dict):
        pass


def test_nothing_is_served_unless_asked_for() -> None:
    with served(None, 0, dict) as address:
        assert address is None
