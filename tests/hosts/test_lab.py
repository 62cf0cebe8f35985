"""The lab itself: it does what it says, and leaves nothing behind."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.lab import Lab, why_not
from tests.hosts.names import answer
from tests.waiting import eventually

needs_hosts = pytest.mark.skipif(bool(why_not()), reason=f"no hosts can be made here: {why_not()}")
_PORT = 7
#: Packets within one machine take no millisecond.
_SOON_S = 1.0


def namespaces() -> set[str]:
    return {path.name for path in Path("/run/netns").glob("draftmq-*")}


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(["one", "two"]) as made:
        yield made


@pytest.fixture
def listening(lab: Lab) -> Iterator[None]:
    """Somebody listens on host two, on both families."""

    def listen() -> socket.socket:
        server = socket.create_server(("::", _PORT), family=socket.AF_INET6, dualstack_ipv6=True)
        server.setblocking(False)
        return server

    with lab.on("two", listen):
        yield


def reaches(lab: Lab, family: int = 4) -> bool:
    """Whether a connection from one to two can be made."""

    def connect() -> bool:
        try:
            socket.create_connection((lab.address("two", family), _PORT), _SOON_S).close()
        except OSError:
            return False
        return True

    return lab.on("one", connect)


@needs_hosts
def test_hosts_reach_each_other_until_they_are_parted(lab: Lab, listening: None) -> None:
    eventually(lambda: reaches(lab, 4))
    eventually(lambda: reaches(lab, 6))
    for fault in (lab.part, lab.one_way):
        fault("two", "one")
        assert not reaches(lab, 4)
        assert not reaches(lab, 6)
        lab.heal()
        eventually(lambda: reaches(lab, 4))
        eventually(lambda: reaches(lab, 6))


@needs_hosts
def test_a_host_that_moves_is_where_its_name_says(lab: Lab, listening: None) -> None:
    before = lab.address("two")
    lab.move("two")
    assert lab.address("two") != before
    eventually(lambda: reaches(lab, 4))
    lab.use(6)
    assert not reaches(lab, 4)
    eventually(lambda: reaches(lab, 6))


@needs_hosts
def test_a_line_that_loses_everything(lab: Lab, listening: None) -> None:
    end = lab.disturb("one", delay_s=0.0, loss=1.0)
    assert not reaches(lab)
    end()
    eventually(lambda: reaches(lab))


@needs_hosts
def test_two_labs_do_not_meet_and_leave_nothing(lab: Lab, listening: None) -> None:
    before = namespaces()

    def breaks_in_the_midst() -> None:
        with Lab(["one", "two"]) as other:
            assert not reaches(other)
            eventually(lambda: reaches(lab))
            raise RuntimeError("in the midst")

    with pytest.raises(RuntimeError, match="in the midst"):
        breaks_in_the_midst()
    assert namespaces() == before


@needs_hosts
def test_what_a_killed_lab_leaves_goes_when_the_next_begins() -> None:
    made = "from tests.hosts.lab import Lab; Lab(['one']).__enter__(); print(1, flush=True)"
    command = [sys.executable, "-c", f"{made}; import time; time.sleep(600)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        left = {name for name in namespaces() if name.startswith(f"draftmq-{process.pid}-")}
        process.send_signal(signal.SIGKILL)
    assert len(left) == 2
    with Lab(["one"]):
        assert not left & namespaces()


def test_the_name_server_knows_its_names_and_no_others() -> None:
    question = b"\x12\x34\x01\x00\x00\x01" + bytes(6) + b"\x05Other\x04test\x00\x00%c\x00\x01"
    known = {"other.test": "10.1.2.3"}
    assert answer(question % 1, known).endswith(bytes([0, 4, 10, 1, 2, 3]))
    assert answer(question % 28, known)[6:8] == bytes(2)  # no IPv6, but the name is right
    assert answer(question % 28, known)[3] & 15 == 0
    assert answer(question % 1, {})[3] & 15 == 3
