"""The page for users says what is so."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

from broker.chaos.control import Control
from broker.chaos.faults import Kind
from broker.chaos.script import load_script
from tests.broker.chaos.conftest import Bench

PAGE = (Path(__file__).parents[3] / "docs" / "chaos.md").read_text()


def test_the_script_of_the_page_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.S)
    (tmp_path / "bad-day.toml").write_text(text)
    assert len(load_script(tmp_path / "bad-day.toml").rules) == text.count("[[fault]]") == 3


def test_every_kind_of_fault_has_its_row() -> None:
    assert set(re.findall(r"^\| `([a-z-]+)` \| ", PAGE, flags=re.M)) >= set(Kind)


def test_the_requests_of_the_page_work(bench: Bench) -> None:
    control = Control("127.0.0.1:0", bench.proxy())
    control.start()
    calls = re.findall(r"^curl -X (\w+) 127.0.0.1:9700(/\w+)(?: -d '(.*)')?$", PAGE, flags=re.M)
    try:
        for method, path, body in calls:
            url = f"http://{control.address}{path}"
            request = urllib.request.Request(url, body.encode() or None, method=method)
            with urllib.request.urlopen(request, timeout=10) as response:
                assert json.load(response)
    finally:
        control.stop()
    assert len(calls) == 3


def test_the_code_of_the_page_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    exec(code, {})
