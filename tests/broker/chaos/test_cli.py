"""``draftmq chaos`` as a process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.broker.chaos.conftest import Bench, Echo, ask
from tests.waiting import eventually

PATIENCE_S = 30.0


def arguments(*more: object) -> list[str]:
    return [sys.executable, "-m", "broker.commands", *map(str, more)]


def chaos(*more: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments("chaos", *more),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=os.environ | environment,
        check=False,
    )


@contextlib.contextmanager
def running(*more: object) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The process, and what it says that it listens on."""
    command = arguments("chaos", *more, "--log-format", "json")
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stderr is not None
    try:
        lines = map(json.loads, child.stderr)
        yield child, next(line for line in lines if line["event"] == "listening")
    finally:
        child.kill()
        child.communicate()


def ends(echo: Echo) -> list[object]:
    return ["--listen", "tcp://127.0.0.1:0", "--upstream", echo.endpoint]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_forwards_until_a_signal_and_says_what_it_did(
    bench: Bench, number: signal.Signals
) -> None:
    with running(*ends(bench.echo), "--delay", 0.01, "--json") as (child, listening):
        client = bench.client(listening["listen"])
        assert ask(client, b"through") == b"through"
        child.send_signal(number)
        said, log = child.communicate(timeout=PATIENCE_S)
    assert child.returncode == 0, log
    summary = json.loads(said)
    assert summary["injected"]["delay"] == 1
    assert summary["counters"]["bytes_up"] == len(b"through")


def test_every_fault_of_a_script_is_logged_and_the_seed_is_its_own(
    bench: Bench, tmp_path: Path
) -> None:
    script = tmp_path / "script.toml"
    script.write_text('seed = 9\n[[fault]]\nkind = "cut"\nevery = 0.2\nhow = "fin"\n')
    with running(*ends(bench.echo), "--script", script, "--duration", 1) as (child, listening):
        client = bench.client(listening["listen"])
        with contextlib.suppress(OSError):
            ask(client, b"?")
        assert client.recv(1) == b""
        said, log = child.communicate(timeout=PATIENCE_S)
    assert (child.returncode, listening["seed"]) == (0, 9)
    assert said == "1 connections; injected: 1 cut\n"
    injected = [json.loads(line) for line in log.splitlines() if '"injected"' in line]
    assert [(line["kind"], line["how"], line["connection"]) for line in injected] == [
        ("cut", "fin", 1)
    ]


@pytest.mark.parametrize(
    ("more", "code", "wanted"),
    [
        (["--listen", "tcp://127.0.0.1:0"], 2, "Missing option '--upstream'"),
        (["--listen", "x", "--upstream", "y"], 1, "'x' is no address; write tcp://HOST:PORT"),
        (
            ["--listen", "tcp://0.0.0.0:0", "--upstream", "tcp://127.0.0.1:1"],
            1,
            "say --insecure",
        ),
    ],
)
def test_wrong_usage_is_one_sentence(more: list[str], code: int, wanted: str) -> None:
    done = chaos(*more)
    assert done.returncode == code
    assert wanted in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_script_ends_it_before_it_listens(echo: Echo, tmp_path: Path) -> None:
    script = tmp_path / "script.toml"
    script.write_text('[[fault]]\nkind = "cut"\nevery = "often"\n')
    done = chaos(*ends(echo), "--script", script)
    assert done.returncode == 1
    assert "fault 1, line 3: 'every' is 'often'; it must be a number" in done.stderr


def test_settings_come_from_the_environment_too(echo: Echo) -> None:
    done = chaos(*ends(echo), "--duration", "0.1", DRAFTMQ_CHAOS_SEED="much")
    assert done.returncode == 2
    assert "'much' is not a valid integer" in done.stderr
    done = chaos(*ends(echo), DRAFTMQ_CHAOS_DURATION="0.1", DRAFTMQ_CHAOS_CONTROL="127.0.0.1:0")
    assert (done.returncode, done.stdout) == (0, "0 connections; injected: nothing\n")


def test_it_never_loads_torch(echo: Echo) -> None:
    code = (
        "import sys; from broker.commands import cli; "
        f"cli.main(['chaos', *{ends(echo)!r}, '--duration', '0.1'], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], timeout=PATIENCE_S, check=False).returncode
        == 0
    )


def test_it_survives_running_out_of_file_descriptors(bench: Bench) -> None:
    with running(*ends(bench.echo)) as (child, listening):
        limit(child.pid, 40)
        address = ("127.0.0.1", int(listening["listen"].rpartition(":")[2]))
        crowd = [socket.create_connection(address, timeout=PATIENCE_S) for _ in range(60)]
        for client in crowd:
            client.close()
        eventually(lambda: answered(bench, listening["listen"]))
        assert child.poll() is None


def answered(bench: Bench, endpoint: str) -> bool:
    try:
        return ask(bench.client(endpoint), b"back") == b"back"
    except OSError:
        return False


def limit(pid: int, n_files: int) -> None:
    import resource

    resource.prlimit(pid, resource.RLIMIT_NOFILE, (n_files, n_files))
