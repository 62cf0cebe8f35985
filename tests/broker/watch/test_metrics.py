from __future__ import annotations

import json
from collections import deque
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from broker.core import Side
from broker.core.inspect import snapshot
from broker.histogram import Histogram
from broker.protocol import messages as m
from broker.watch import exposition
from broker.watch.metrics import _COUNTED, metrics
from tests.broker.core.rig import Rig, model


@pytest.fixture
def rig() -> Rig:
    return Rig()


def seen(rig: Rig) -> dict[str, Any]:
    """What a service with this core would show, as it comes out of JSON."""
    sides = {side.value: {"received": 0, "sent": 0} for side in Side}
    shown = snapshot(rig.core, rig.now) | {"uptime_s": 1.0, "bytes": sides}
    return dict(json.loads(json.dumps(shown)))


def exposed(rig: Rig) -> dict[str, float]:
    """All samples, named as Prometheus names them."""
    shown = seen(rig)
    _, _, body = exposition.page(metrics(tuple(shown["counters"])), shown, {})
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


# -- histograms ---------------------------------------------------------------------------------


def test_a_value_is_counted_in_the_first_bucket_that_it_is_not_above() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]
    assert histogram.plain() == {"count": 5, "sum": 14.0, "buckets": [[1.0, 2], [2.0, 4]]}


# -- what is measured ---------------------------------------------------------------------------


def test_wait_service_and_compute_times_are_measured_for_each_model(rig: Rig) -> None:
    rig.client("a")
    one = rig.ask("a", 1)
    rig.now += 3.0
    rig.worker("w")  # it is assigned now
    rig.now += 2.0
    rig.reply("w", one, compute_s=1.5)
    measured = seen(rig)["measures"]["tiny"]
    sums = {name: measured[name]["sum"] for name in ("queue_wait_s", "service_s", "compute_s")}
    assert sums == {"queue_wait_s": 3.0, "service_s": 2.0, "compute_s": 1.5}
    assert measured["tokens"] == 100


def test_a_request_that_was_queued_again_waits_once(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    one = rig.ask("a", 1)
    rig.cut(Side.WORKER, "w")
    rig.now += 3.0
    rig.worker("v")
    rig.reply("v", one)
    measured = seen(rig)["measures"]["tiny"]
    assert measured["queue_wait_s"]["count"] == measured["service_s"]["count"] == 1
    assert measured["queue_wait_s"]["sum"] == 0.0


def test_only_replies_are_measured_as_service(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    rig.fail("w", rig.ask("a", 1), "bad_request")
    assert seen(rig)["measures"]["tiny"]["service_s"]["count"] == 0


def test_the_times_of_the_last_requests_are_remembered_and_no_more(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    assert rig.core.measures.last.maxlen is not None
    rig.core.measures.last = deque(maxlen=2)
    for number in (1, 2, 3):
        rig.reply("w", rig.ask("a", number))
    assert [times.id.number for times in rig.core.measures.last] == [2, 3]


# -- what is exposed ----------------------------------------------------------------------------


def test_an_empty_broker_exposes_its_metrics(rig: Rig) -> None:
    samples = exposed(rig)
    assert samples["draftmq_broker_requests_total"] == 0
    assert samples["draftmq_broker_clients{state=connected}"] == 0
    assert samples["process_resident_memory_bytes"] > 0


def test_queue_workers_and_counters_are_exposed(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w", credits=1)
    rig.worker("v", description=model("other"))
    rig.from_worker("v", m.Draining())
    for number in (1, 2, 3):
        rig.ask("a", number, model="tiny")
    rig.ask("a", 3, model="tiny")
    rig.ask("a", 4, model="nowhere")
    rig.cut(Side.CLIENT, "a")
    samples = exposed(rig)
    wanted = {
        "draftmq_broker_queue_depth{model=tiny}": 2,
        "draftmq_broker_in_flight{model=tiny}": 1,
        "draftmq_broker_in_flight{model=other}": 0,
        "draftmq_broker_stuck_requests{why=without_worker}": 1,
        "draftmq_broker_workers{model=tiny,state=busy}": 1,
        "draftmq_broker_workers{model=tiny,state=idle}": 0,
        "draftmq_broker_workers{model=other,state=draining}": 1,
        "draftmq_broker_worker_in_flight{model=tiny,worker=w}": 1,
        "draftmq_broker_clients{state=disconnected}": 1,
        "draftmq_broker_requests_total": 4,
        "draftmq_broker_resends_total": 1,
        "draftmq_broker_queue_wait_seconds_count{model=tiny}": 1,
        "draftmq_broker_queue_wait_seconds_bucket{le=+Inf,model=tiny}": 1,
        "draftmq_broker_queue_wait_seconds_bucket{le=0.0001,model=tiny}": 1,
        "draftmq_broker_warnings": 2,
    }
    assert {name: samples.get(name) for name in wanted} == wanted


def test_every_counter_of_the_core_is_exposed_with_a_meaning(rig: Rig) -> None:
    assert set(rig.core.counters) <= set(_COUNTED)
    assert {f"draftmq_broker_{name}_total" for name in rig.core.counters} <= set(exposed(rig))


def test_hostile_names_are_only_labels(rig: Rig) -> None:
    name = 'w"} 1\ndraftmq_broker_requests_total 9\\'
    rig.worker(name, connection="w")
    samples = exposed(rig)
    assert samples["draftmq_broker_requests_total"] == 0
    assert any(name in labels for labels in samples)


# -- warnings -----------------------------------------------------------------------------------


def test_all_is_well(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    rig.ask("a", 1)
    assert seen(rig)["warnings"] == []


def test_a_missing_worker_is_warned_of(rig: Rig) -> None:
    assert seen(rig)["warnings"] == ["no worker is attached"]
    rig.client("a")
    rig.ask("a", 1)
    assert seen(rig)["warnings"] == ["no worker is attached; 1 request waits"]


def test_a_model_that_nobody_serves_is_warned_of(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    rig.ask("a", 1, model="nowhere")
    assert seen(rig)["warnings"] == ["1 request waits for 'nowhere': no worker serves that"]


def test_a_mapping_that_nobody_offers_is_warned_of_after_a_while(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    rig.ask("a", 1, mapping_id="m1")
    assert seen(rig)["warnings"] == []
    rig.pass_time(6.0, (Side.CLIENT, "a"), (Side.WORKER, "w"))
    (warning,) = seen(rig)["warnings"]
    assert "vocab mapping m1" in warning


def test_workers_that_all_leave_and_peers_gone_silent_are_warned_of(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    rig.from_worker("w", m.Draining())
    rig.now += 3.0
    every, worker, trainer = seen(rig)["warnings"]
    assert every == "every worker is leaving"
    assert worker == "worker w is silent for 3.0 s, lost at 5 s"
    assert trainer.startswith("trainer a (rank 0) is silent for 3.0 s")


def test_a_thousand_warnings_are_counted_and_not_shown(rig: Rig) -> None:
    rig.worker("w")
    for number in range(1000):
        rig.client(f"rank{number}")
        rig.cut(Side.CLIENT, f"rank{number}")
    found = seen(rig)["warnings"]
    assert len(found) == 21
    assert found[-1] == "and 980 more"
