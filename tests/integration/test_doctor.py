"""The doctor says what works, and for each thing that does not, what to do."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from broker.commands import cli
from tests.integration.conftest import Cluster, cluster, target
from tests.ports import free_port
from tests.waiting import eventually
from trainer_client import doctor
from trainer_client.doctor import Finding, examine, is_healthy

__all__ = ["cluster", "target"]  # fixtures


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.what.partition(" ")[0]: finding for finding in findings}


def test_where_all_is_well_every_line_says_so(cluster: Cluster) -> None:
    cluster.worker()
    eventually(lambda: cluster.broker.snapshot()["workers"])
    port = cluster.broker.client_endpoint.rpartition(":")[2]
    http = cluster.broker.http_address
    findings = by_name(examine(f"tcp://localhost:{port}", http=str(http)))
    assert is_healthy(findings.values()), list(map(str, findings.values()))
    assert set(findings) >= {"versions", "name", "port", "keys", "broker", "workers", "direct"}
    assert set(findings) >= {"http", "clock", "bandwidth"}
    assert "8 MB to the broker at " in findings["bandwidth"].seen
    assert "1 attached, 1 offers" in findings["workers"].seen
    eventually(lambda: not cluster.broker.snapshot()["clients"])  # it has said goodbye


def test_a_broker_without_workers_is_said(cluster: Cluster) -> None:
    findings = by_name(examine(cluster.broker.client_endpoint))
    assert findings["broker"].good
    assert not findings["workers"].good
    assert "start a draftmq worker" in findings["workers"].advice


def test_a_way_on_which_bytes_do_not_come_in_time_is_said(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_SENT_S", 0.0)
    found = by_name(examine(cluster.broker.client_endpoint))["bandwidth"]
    assert not found.good
    assert "8 MB to the broker at less than " in found.seen
    eventually(lambda: not cluster.broker.core.entries)  # it leaves nothing there


def test_the_port_for_workers_is_told_from_that_for_trainers(cluster: Cluster) -> None:
    findings = by_name(examine(cluster.broker.worker_endpoint))
    assert not findings["broker"].good
    assert "port for workers" in findings["broker"].seen


def test_nobody_there_and_no_such_name() -> None:
    findings = by_name(examine(f"tcp://127.0.0.1:{free_port()}"))
    assert not findings["port"].good
    assert "nobody listens; start the broker" in str(findings["port"])
    assert "broker" not in findings
    findings = by_name(examine("tcp://no-such-host.invalid:5555"))
    assert not findings["name"].good
    assert "give the broker's IP address" in findings["name"].advice


def test_what_listens_and_is_no_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer_client.doctor._WELCOME_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as other:
        findings = by_name(examine(f"tcp://127.0.0.1:{other.getsockname()[1]}"))
    assert findings["port"].good
    assert not findings["broker"].good
    assert "is a draftmq broker there" in findings["broker"].advice


def test_a_key_without_its_counterpart(tmp_path: Path, cluster: Cluster) -> None:
    findings = by_name(examine(cluster.broker.client_endpoint, key=tmp_path / "none.secret"))
    assert not findings["keys"].good
    assert "--broker-key" in findings["keys"].seen


def test_the_command_prints_and_its_exit_code_says_whether_all_is_well(cluster: Cluster) -> None:
    shown = CliRunner().invoke(cli, ["doctor", "--broker", cluster.broker.client_endpoint])
    assert shown.exit_code == 1
    assert "ok   broker: " in shown.output
    assert "FAIL workers: none is attached" in shown.output
    cluster.worker()
    eventually(lambda: cluster.broker.snapshot()["workers"])
    arguments = ["doctor", "--broker", cluster.broker.client_endpoint, "--json"]
    shown = CliRunner().invoke(cli, arguments)
    assert shown.exit_code == 0, shown.output
    assert {each["good"] for each in json.loads(shown.output)} == {True}
