"""What rank 0 sees of the others, over real connections; the followers are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest

from tests.waiting import eventually
from worker.errors import TargetError, TargetGoneError
from worker.targets import ranks
from worker.targets.ranks import Leader, join


class Follower:
    """One of the other ranks: says of each order what it is told to say; nothing for None."""

    def __init__(self, says: Callable[[Any], str | None]) -> None:
        self.ours, self._theirs = Pipe()
        self._says = says
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while (order := self._theirs.recv()) is not None:
            if (word := self._says(order)) is not None:
                self._theirs.send(word)
        self._theirs.close()

    def end(self) -> None:
        self.ours.send(None)
        self._thread.join()


def close(*connections: Connection) -> None:
    """Close rank 0's ends when nobody listens on them any more: the others' are closed."""
    eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("draftmq-rank")])
    for connection in connections:
        connection.close()


@pytest.fixture
def follow() -> Iterator[Callable[..., list[Connection]]]:
    followers: list[Follower] = []

    def start(*says: Callable[[Any], str | None]) -> list[Any]:
        followers.extend(Follower(each) for each in says)
        return [each.ours for each in followers]

    yield start
    for each in followers:
        each.end()
    close(*(each.ours for each in followers))


def fine(order: Any) -> str:
    return ""


def test_all_run_what_rank_0_runs_and_its_part_is_what_comes_back(follow: Any) -> None:
    leader = Leader("t", follow(fine, fine), {"double": lambda number: 2 * number})
    assert [leader.run("double", number) for number in (3, 4)] == [6, 8]


def test_an_error_that_all_ranks_have_is_one_of_the_request_and_they_go_on(follow: Any) -> None:
    def says(order: Any) -> str:
        return "" if order[1][0] else "ZeroDivisionError"

    leader = Leader("t", follow(says, says), {"divide": lambda by: 1 // by})
    with pytest.raises(ZeroDivisionError):
        leader.run("divide", 0)
    assert leader.run("divide", 1) == 1


def test_a_rank_that_fails_alone_is_named(follow: Any) -> None:
    leader = Leader("t", follow(fine, lambda order: "OSError: disk"), {"run": lambda: 1})
    with pytest.raises(TargetError, match="target 't' failed in rank 2: OSError: disk"):
        leader.run("run")


def test_a_rank_that_ends_while_nothing_runs_is_told_at_once() -> None:
    ours, theirs = Pipe()
    leader = Leader("t", [ours], {"run": lambda: 1})
    told: list[TargetGoneError] = []
    leader.when_gone = told.append
    theirs.close()
    eventually(lambda: told)
    assert "rank 1 has ended" in str(told[0])
    with pytest.raises(TargetGoneError, match="no longer together"):
        leader.run("run")
    close(ours)


def test_a_rank_that_ends_in_a_forward_makes_its_failure_the_targets_end() -> None:
    ours, theirs = Pipe()

    def interrupted() -> None:
        theirs.close()
        raise RuntimeError("connection closed by peer")  # as gloo says it

    leader = Leader("t", [ours], {"run": interrupted})
    with pytest.raises(TargetGoneError, match="rank 1 has ended"):
        leader.run("run")
    close(ours)


def test_a_rank_that_says_nothing_is_given_up(follow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "PATIENCE_S", 0.05)
    leader = Leader("t", follow(fine, lambda order: None), {"run": lambda: 1})
    with pytest.raises(TargetGoneError, match="rank 2 did not end"):
        leader.run("run")


def test_rank_0_that_hangs_where_another_failed_is_told(
    follow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a collective that the other never entered: only the process's end ends that."""
    monkeypatch.setattr(ranks, "PATIENCE_S", 0.05)
    hangs = threading.Event()
    leader = Leader("t", follow(lambda order: "OSError: memory"), {"run": hangs.wait})
    leader.when_gone = lambda error: hangs.set()
    with pytest.raises(TargetGoneError, match=r"rank 1 failed .OSError: memory.*hangs"):
        leader.run("run")


@pytest.mark.parametrize(
    ("environment", "wanted", "said"),
    [
        ({}, 0, "start it with torchrun --nproc-per-node N -m worker --tp"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x"}, 0, "started 1 ranks.*two or more"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, 4, "started 2 ranks.*wants 4"),
    ],
)
def test_ranks_that_are_not_there_are_asked_for(
    environment: dict[str, str], wanted: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TargetError, match=said):
        join("cpu", wanted)
