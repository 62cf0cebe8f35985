"""Dashboard, alerts and scrape configuration speak of metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker.core import BrokerCore
from broker.watch.exposition import Metric
from broker.watch.metrics import metrics
from tests.deploy import command_lines as lines
from trainer_client.watch.metrics import METRICS as TRAINER
from worker.metrics import METRICS as WORKER

DASHBOARD = lines.DEPLOY / "grafana" / "draftmq.json"
ALERTS = lines.DEPLOY / "prometheus" / "alerts.yml"
SCRAPE = lines.DEPLOY / "prometheus" / "scrape.yml"


def samples_of(metric: Metric) -> set[str]:
    """The names that queries may use of a metric."""
    if metric.kind == "histogram":
        return {f"{metric.name}{suffix}" for suffix in ("_bucket", "_sum", "_count")}
    return {metric.name}


EXPOSED = {
    name: metric
    for metric in (*metrics(tuple(BrokerCore("b").counters)), *WORKER, *TRAINER)
    for name in samples_of(metric)
}


def expressions(path: Path) -> list[str]:
    if path.suffix == ".json":
        dashboard = json.loads(path.read_text())
        targets = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
        return [*targets, *(v["query"] for v in dashboard["templating"]["list"])]
    groups = yaml.safe_load(path.read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


@pytest.mark.parametrize("path", [DASHBOARD, ALERTS], ids=lambda path: path.name)
def test_every_metric_that_is_asked_for_exists(path: Path) -> None:
    asked = {name for text in expressions(path) for name in re.findall(r"draftmq_\w+", text)}
    assert len(asked) > 5
    assert asked - set(EXPOSED) == set()


@pytest.mark.parametrize("path", [DASHBOARD, ALERTS], ids=lambda path: path.name)
def test_every_label_that_is_asked_for_exists(path: Path) -> None:
    everywhere = {"instance", "job", "le"}
    for text in expressions(path):
        for name, selector in re.findall(r"(draftmq_\w+)\{([^}]*)\}", text):
            labels = set(re.findall(r"(\w+)=", selector))
            assert labels <= {*EXPOSED[name].labels, *everywhere}, text
        for by in re.findall(r"by \(([^)]*)\)", text):
            names = re.findall(r"draftmq_\w+", text)
            known = everywhere.union(*(EXPOSED[name].labels for name in names))
            assert {label.strip() for label in by.split(",")} <= known, text


@pytest.mark.parametrize("path", [DASHBOARD, ALERTS], ids=lambda path: path.name)
def test_counters_are_asked_for_as_rates_and_gauges_are_not(path: Path) -> None:
    for text in expressions(path):
        rated = set(re.findall(r"(?:rate|increase)\((draftmq_\w+)", text))
        for name in re.findall(r"draftmq_\w+", text):
            assert (EXPOSED[name].kind != "gauge") == (name in rated), text


def test_the_dashboards_panels_are_told_apart_and_do_not_overlap() -> None:
    panels: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = set()
    for panel in panels:
        at = panel["gridPos"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert x < 24
                assert (x, y) not in cells, panel["title"]
                cells.add((x, y))


def test_every_job_that_is_asked_for_is_scraped() -> None:
    scraped = {job["job_name"] for job in yaml.safe_load(SCRAPE.read_text())["scrape_configs"]}
    for path in (DASHBOARD, ALERTS):
        assert set(re.findall(r'job="([\w-]+)"', path.read_text().replace("\\", ""))) <= scraped


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool: apt-get install prometheus")
def test_prometheus_takes_the_files(tmp_path: Path) -> None:
    config = yaml.safe_load(SCRAPE.read_text()) | {"rule_files": [str(ALERTS)]}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    result = subprocess.run(
        ["promtool", "check", "config", tmp_path / "prometheus.yml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
