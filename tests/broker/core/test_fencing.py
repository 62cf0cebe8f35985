"""Who of two lives of one name is the newer: what brokers saw tells it, and no clock."""

from __future__ import annotations

import pytest

from broker.protocol import messages as m
from tests.broker.core.rig import Rig, model

ROLES = ("client", "worker")


class Peers:
    """Lives of one name, which keep the number that they are given."""

    def __init__(self, rig: Rig, role: str) -> None:
        self.rig = rig
        self.role = role
        self.admissions: dict[int, m.Admission] = {}

    def hello(self, life: int, connection: str, *, hears: bool = True) -> str:
        """Say hello, and read the answer: ``welcome`` or the code of the refusal."""
        known = self.admissions.get(life)
        if self.role == "client":
            self.rig.from_client(connection, m.ClientHello("p", life, "job", 0, known))
        else:
            hello = m.WorkerHello("p", life, model(), 1, (), known)
            self.rig.from_worker(connection, hello)
        answer = self.rig.got(connection)[-1]
        if isinstance(answer, m.Refused):
            return answer.code
        assert isinstance(answer, m.Welcome)
        if hears and answer.number:
            self.admissions.setdefault(life, m.Admission(answer.broker, answer.number))
        return "welcome"

    @property
    def there(self) -> int:
        """The life that has the session."""
        sessions = self.rig.core.clients if self.role == "client" else self.rig.core.workers
        return sessions["p"].incarnation

    def refused(self, connection: str) -> bool:
        return any(message.code == "fenced" for message in self.rig.got(connection, m.Refused))  # type: ignore[union-attr]


@pytest.fixture(params=ROLES)
def peers(request: pytest.FixtureRequest) -> Peers:
    return Peers(Rig(), request.param)


@pytest.mark.parametrize("lives", [(5, 6), (6, 5)])
def test_who_comes_for_the_first_time_is_the_newer(peers: Peers, lives: tuple[int, int]) -> None:
    old, new = lives
    assert peers.hello(old, "one") == "welcome"
    assert peers.hello(new, "two") == "welcome"
    assert peers.refused("one")
    assert peers.hello(old, "three") == "fenced"
    assert peers.there == new


@pytest.mark.parametrize("lives", [(5, 6), (6, 5)])
def test_a_life_that_never_heard_its_number_is_still_the_older(
    peers: Peers, lives: tuple[int, int]
) -> None:
    old, new = lives
    peers.hello(old, "one", hears=False)
    peers.hello(new, "two")
    assert peers.hello(old, "three") == "fenced"
    assert peers.hello(new, "four") == "welcome"
    assert peers.hello(old, "five") == "fenced"


@pytest.mark.parametrize("lives", [(5, 6), (6, 5)])
@pytest.mark.parametrize("first", ["old", "new"])
def test_numbers_outlive_a_restart_of_the_broker(
    peers: Peers, lives: tuple[int, int], first: str
) -> None:
    old, new = lives
    peers.hello(old, "one")
    peers.hello(new, "two")
    peers.rig = Rig()
    peers.rig.core.incarnation = "b2"
    if first == "old":
        assert peers.hello(old, "one") == "welcome"
        assert peers.hello(new, "two") == "welcome"
        assert peers.refused("one")
    else:
        assert peers.hello(new, "two") == "welcome"
        assert peers.hello(old, "one") == "fenced"
    assert peers.there == new


@pytest.mark.parametrize("lives", [(5, 6), (6, 5)])
def test_who_begins_after_a_restart_is_newer_than_who_was_there_before(
    peers: Peers, lives: tuple[int, int]
) -> None:
    old, new = lives
    peers.hello(old, "one")
    peers.rig = Rig()
    peers.rig.core.incarnation = "b2"
    assert peers.hello(new, "two") == "welcome"
    assert peers.hello(old, "one") == "fenced"
    assert peers.hello(new, "three") == "welcome"
    assert peers.there == new


def test_a_worker_that_is_cut_off_for_a_moment_loses_its_name_to_no_leftover() -> None:
    peers = Peers(Rig(), "worker")
    peers.hello(6, "one")
    peers.hello(5, "two")
    peers.rig.from_worker("two", m.Goodbye("cut"))
    assert peers.hello(6, "three") == "welcome"  # nobody else is there
    assert peers.hello(5, "four") == "welcome"
    assert peers.refused("three")
    assert peers.there == 5


def test_numbers_say_nothing_of_other_names(peers: Peers) -> None:
    rig = peers.rig
    for life, name in enumerate(("a", "b", "c")):
        rig.from_client(name, m.ClientHello(name, life, "job", 0))
    numbers = [message.number for name in "abc" for message in rig.got(name, m.Welcome)]  # type: ignore[union-attr]
    assert numbers == [1, 2, 3]
    assert peers.hello(1, "p") == "welcome"
