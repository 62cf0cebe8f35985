from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from broker.commands import cli
from broker.core.inspect import snapshot
from broker.service import Broker
from broker.watch.http import HttpServer, as_json
from broker.watch.rates import rates
from broker.watch.screen import duration, screen, short, size
from tests.broker.core.rig import Rig

PATIENCE_S = 30.0


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.client("a")
    rig.worker("w")
    return rig


@pytest.fixture
def address() -> Iterator[str]:
    with Broker(http="127.0.0.1:0") as broker:
        assert broker.http_address is not None
        yield broker.http_address


def seen(rig: Rig, received_bytes: int = 0) -> dict[str, Any]:
    moved = {"client": {"received": received_bytes, "sent": 0}}
    return snapshot(rig.core, rig.now) | {"uptime_s": rig.now, "bytes": moved}


def printed(shown: dict[str, Any], rated: dict[str, Any] | None = None) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(screen(shown, rated, address="here"))
    return out.getvalue()


# -- rates --------------------------------------------------------------------------------------


def test_rates_are_differences_over_the_brokers_own_clock(rig: Rig) -> None:
    before = seen(rig)
    one, two = rig.ask("a", 1), rig.ask("a", 2)
    rig.now += 1.0
    rig.reply("w", one, compute_s=0.75)
    rig.now += 1.0
    rig.reply("w", two, compute_s=0.25)
    rated = rates(before, seen(rig, received_bytes=3000))
    assert rated is not None
    assert rated["seconds"] == 2.0
    assert rated["requests_per_s"] == rated["replies_per_s"] == 1.0
    assert rated["tokens_per_s"] == 100.0
    assert rated["received_bytes_per_s"] == 1500.0
    assert (rated["queue_wait_s"], rated["service_s"], rated["compute_s"]) == (0.5, 1.0, 0.5)
    assert rated["workers"] == {"w": 1.0}
    assert rated["clients"] == {"a": 1.0}


def test_nothing_that_happened_has_no_times(rig: Rig) -> None:
    before = seen(rig)
    rig.now += 1.0
    rated = rates(before, seen(rig))
    assert rated is not None
    assert (rated["replies_per_s"], rated["service_s"]) == (0.0, None)


def test_another_broker_or_the_same_instant_gives_no_rates(rig: Rig) -> None:
    before = seen(rig)
    assert rates(before, before) is None
    rig.now += 1.0
    assert rates(before, seen(rig) | {"broker": "restarted"}) is None
    assert rates(None, before) is None


def test_a_worker_that_came_meanwhile_or_again_has_a_rate(rig: Rig) -> None:
    rig.reply("w", rig.ask("a", 1))
    before = seen(rig)
    rig.worker("w", incarnation=2)
    rig.worker("v")
    rig.now += 1.0
    rated = rates(before, seen(rig))
    assert rated is not None
    assert rated["workers"] == {"v": 0.0, "w": 0.0}


# -- the screen ---------------------------------------------------------------------------------


def test_the_screen_shows_workers_ranks_and_warnings(rig: Rig) -> None:
    before = seen(rig)
    rig.reply("w", rig.ask("a", 1))
    rig.ask("a", 2)
    rig.now += 4.0
    shown = seen(rig)
    text = printed(shown, rates(before, shown))
    assert "! worker w is silent for 4.0 s" in text
    assert "1 model " in text
    assert "0.2 replies/s" in text
    assert "busy" in text


def test_names_from_outside_steer_no_terminal(rig: Rig) -> None:
    rig.worker("\x1b[2Jgone[bold]", connection="x")
    text = printed(seen(rig))
    assert "\x1b" not in text
    assert "[2Jgone[bold]" in text


def test_a_long_table_is_cut_and_counted(rig: Rig) -> None:
    for number in range(30):
        rig.client(f"rank{number}")
    assert "and 11 more" in printed(seen(rig))


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (size(1023), "1023 B"),
        (size(1536), "1.5 KiB"),
        (size(3 * 1024**4), "3.0 TiB"),
        (short(None), "-"),
        (short(0.00025), "250 µs"),
        (short(0.25), "250 ms"),
        (short(99.95), "100.0 s"),
        (short(125), "2 min 5 s"),
        (duration(0.2), "0 s"),
        (duration(90061), "1 d 1 h"),
    ],
)
def test_numbers_are_written_for_people(shown: str, wanted: str) -> None:
    assert shown == wanted


# -- the commands -------------------------------------------------------------------------------


def test_status_prints_json_or_a_screen(address: str) -> None:
    as_json = CliRunner().invoke(cli, ["status", "--http", address, "--json"])
    assert json.loads(as_json.stdout)["workers"] == []
    shown = CliRunner().invoke(cli, ["status", "--http", address])
    assert "! no worker is attached" in shown.stdout


def test_top_once_prints_rates_of_several_brokers(address: str) -> None:
    with Broker(http="127.0.0.1:0") as other:
        arguments = ["--once", "--json", "--interval", 0.1, "--http", address]
        result = CliRunner().invoke(
            cli, ["top", *map(str, arguments), "--http", str(other.http_address)]
        )
    assert result.exit_code == 0
    (line,) = result.stdout.splitlines()
    brokers = json.loads(line)["brokers"]
    assert [broker["http"] for broker in brokers] == [address, other.http_address]
    assert all(broker["rates"]["seconds"] >= 0.1 for broker in brokers)


def test_top_of_a_broker_that_is_not_there_says_so(address: str) -> None:
    with Broker(http="127.0.0.1:0") as gone:
        nobody = str(gone.http_address)
    arguments = ["--once", "--interval", "0.1", "--http", nobody, "--http", address]
    result = CliRunner().invoke(cli, ["top", *arguments])
    assert result.exit_code == 1
    assert f"no broker answers at http://{nobody}" in str(result.exception)
    assert "draftmq broker" in result.stdout  # the other is shown all the same


def test_what_is_no_broker_is_told_apart() -> None:
    server = HttpServer("127.0.0.1:0", {"/status": lambda environ: as_json({"worker": "w"})})
    server.start()
    try:
        result = CliRunner().invoke(cli, ["status", "--http", server.address])
    finally:
        server.stop()
    assert "is no broker" in str(result.exception)


def test_a_proxy_for_the_internet_is_not_asked_for_a_broker(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert CliRunner().invoke(cli, ["status", "--http", address]).exit_code == 0


@pytest.mark.parametrize("key", [b"q", b"xq", b"\x03"], ids=["q", "any-then-q", "ctrl-c"])
def test_top_is_live_and_ends_on_a_key(address: str, key: bytes) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "broker.commands", "top", "--interval", "0.1"]
    process = subprocess.Popen(
        [*command, "--http", address],
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),  # type: ignore[call-overload]
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
        preexec_fn=_take_terminal,
    )
    os.close(theirs)
    try:
        with _Terminal(ours) as terminal:
            terminal.wait_for(b"0 replies/s")  # a rate: it has looked more than once
            os.write(ours, key)
            assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()


def _take_terminal() -> None:
    """Have this session's Ctrl-C come from the terminal on standard input."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class _Terminal:
    """Reads all that a terminal shows, so that who writes there never waits."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._shown = b""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        while not self._done.is_set():
            if select.select([self._descriptor], [], [], 0.05)[0]:
                try:
                    self._shown += os.read(self._descriptor, 65536)
                except OSError:  # the other side is closed
                    return

    def wait_for(self, text: bytes) -> None:
        end = time.monotonic() + PATIENCE_S
        while text not in self._shown:
            assert time.monotonic() < end, f"{text!r} is not in {self._shown!r}"
            time.sleep(0.01)

    def __enter__(self) -> _Terminal:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        os.close(self._descriptor)
