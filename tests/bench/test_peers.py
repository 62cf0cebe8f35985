from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from tests.bench.lines import Line
from tests.bench.peers import mooncake as peer
from tests.bench.peers.driver import Driver
from tests.bench.peers.venv import python_of
from tests.bench.ranks import Step, Trained
from tests.bench.throughput import MIB, MOONCAKE, _beside
from tests.waiting import eventually


def test_a_peer_that_cannot_be_installed_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    told: list[str] = []
    for _ in range(2):
        assert python_of(tmp_path / "peer", [], told.append) is None
    assert [text.startswith("installing") for text in told] == [True, False] * 2
    assert "cannot be measured here" in told[1]


def no_environment(*_: object) -> Path:
    raise AssertionError("an environment would be made")


def test_a_library_that_mooncake_needs_is_told_and_nothing_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peer, "python_of", no_environment)
    monkeypatch.setattr(peer, "_LIBRARY", "libno-such-library.so.1")
    told: list[str] = []
    with peer.mooncake(MIB, told.append, quick=False) as store:
        assert store is None
    assert told == [
        "mooncake cannot be measured here: libno-such-library.so.1 is missing; install it (on "
        "Debian: apt-get install libibverbs1)"
    ]
    with peer.mooncake(MIB, told.append, quick=True) as store:
        assert store is None
    assert len(told) == 1


def test_a_store_that_does_not_come_up_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "_library_is_here", lambda _: True)
    monkeypatch.setattr(peer, "python_of", lambda *_: Path(sys.executable))  # without the store
    told: list[str] = []
    with peer.mooncake(MIB, told.append, quick=False) as store:
        assert store is None
    assert told == ["mooncake cannot be measured here: Mooncake's process ended with 1; see above"]


def test_a_peer_that_is_not_here_has_lines_that_say_so() -> None:
    medians = {("tcp", MIB, 2): 0.5, ("tcp", MIB, 1): 0.001}
    rate, latency = _beside(MOONCAKE, "store", medians, MIB)
    assert (rate.value, rate.peer_value, latency.value) == (1 / 512, None, 1.0)
    _, latency = _beside(MOONCAKE, "store", {**medians, ("store", MIB, 1): 0.002}, MIB)
    assert latency == Line(
        f"1 MiB replies, tcp: latency beside {MOONCAKE}", 1.0, "ms", "", True, MOONCAKE, 2.0
    )


_ECHO = """
import json, subprocess, sys
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "end":
        sys.exit(3)
    child = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL)
    print(json.dumps({"child": child.pid, **asked["with"]}), flush=True)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "driver.py"
    path.write_text(_ECHO)
    return path


def test_a_driver_is_asked_and_ended_with_what_it_has_started(script: Path) -> None:
    with Driver("Echo", Path(sys.executable), script) as driver:
        first, second = (driver.ask("start", number=number) for number in (1, 2))
        assert [first["number"], second["number"]] == [1, 2]
        assert alive(first["child"])
    eventually(lambda: not alive(first["child"]) and not alive(second["child"]))


def test_a_driver_that_ends_is_told_with_its_code(script: Path) -> None:
    with Driver("Echo", Path(sys.executable), script) as driver:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="Echo's process ended with 3; see above"):
                driver.ask("end")


def test_a_driver_that_takes_too_long_is_ended(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr("tests.bench.peers.driver._ANSWER_S", 0.1)
    with (
        Driver("Sleeper", Path(sys.executable), script) as driver,
        pytest.raises(RuntimeError, match="Sleeper's process ended with -9"),
    ):
        driver.ask("anything")


def alive(pid: int) -> bool:
    """Whether it runs; what has ended and waits for init to see it does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_step_waits_as_long_as_the_rank_that_waits_longest() -> None:
    trained = Trained(
        [
            [Step(0.0, 0.1, 1.0), Step(1.0, 1.3, 2.0)],
            [Step(0.0, 0.2, 1.0), Step(1.0, 1.0, 2.0)],
        ]
    )
    assert trained.steps_per_s == 1.0
    assert math.isclose(trained.waiting, (0.2 + 0.3) / 2)
