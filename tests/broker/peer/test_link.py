"""One connection of a peer, from its hello to its end: what it says, and when it gives up."""

from __future__ import annotations

import pytest

from broker.peer.link import Link, LinkState, Reopen, SendTo
from broker.protocol import messages as m

HELLO = m.ClientHello("c", 1, "job", 0)
WELCOME = m.Welcome("b", 4, 2.0, 10.0, 1, 1, 1, 1, 1, ("offer",))


def said(actions: list[object]) -> list[m.Message]:
    return [action.packet.message for action in actions if isinstance(action, SendTo)]


@pytest.fixture
def link() -> Link:
    return Link("b", lambda: HELLO, 100.0)


@pytest.fixture
def ready(link: Link) -> Link:
    link.connected(100.0)
    link.received(WELCOME, 100.0)
    return link


def test_it_greets_when_it_is_connected_and_again_until_it_is_welcome(link: Link) -> None:
    assert said(link.connected(100.0)) == [HELLO]
    assert link.tick(100.9) == []
    assert said(link.tick(101.0)) == [HELLO]
    assert not link.ready


def test_a_welcome_sets_the_rules(ready: Link) -> None:
    assert ready.ready
    assert (ready.window, ready.heartbeat_s, ready.liveness_s) == (4, 2.0, 10.0)
    assert ready.offers == ("offer",)
    assert ready.limits == WELCOME.limits()


def test_it_beats_its_heart_as_often_as_it_was_told(ready: Link) -> None:
    assert ready.next_timer == 102.0
    assert ready.tick(101.9) == []
    assert said(ready.tick(102.0)) == [m.Heartbeat(-1)]
    assert ready.next_timer == 104.0


@pytest.mark.parametrize("sign", ["message", "moving"])
def test_any_message_or_part_of_one_is_a_sign_of_life(ready: Link, sign: str) -> None:
    if sign == "message":
        ready.received(m.Failure(m.RequestId("c", 1, 1), "expired", ""), 109.0)
    else:
        ready.moving(109.0)
    ready.tick(118.9)
    assert ready.ready
    ready.tick(119.0)
    assert ready.state is LinkState.DOWN


def test_silence_takes_it_down_and_opens_a_new_socket(ready: Link) -> None:
    ready.tick(110.0)
    assert ready.state is LinkState.DOWN
    assert (ready.workers, ready.offers, ready.down_since) == (-1, (), 110.0)
    assert ready.next_timer is not None
    assert ready.tick(ready.next_timer) == [Reopen("b")]


def test_waits_between_sockets_double_to_a_second_until_it_is_welcome(link: Link) -> None:
    now, waits = 100.0, []
    for _ in range(7):
        link.connected(now)
        link.disconnected(now)
        assert link.next_timer is not None
        waits.append(round(link.next_timer - now, 3))
        now = link.next_timer
        link.tick(now)
    assert waits == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    link.connected(now)
    link.received(WELCOME, now)
    link.disconnected(now)
    assert link.next_timer == now + 0.05


def test_a_socket_that_never_connects_is_opened_anew(link: Link) -> None:
    assert link.tick(104.9) == []
    assert link.tick(105.0) == [Reopen("b")]
    assert link.next_timer == 110.0


def test_a_broker_that_does_not_know_it_is_greeted_again(ready: Link) -> None:
    assert said(ready.received(m.HelloWanted("b2"), 101.0)) == [HELLO]
    assert ready.state is LinkState.GREETING


def test_nothing_is_tried_after_a_refusal(ready: Link) -> None:
    ready.received(m.Refused("fenced", "a newer life"), 101.0)
    assert ready.refusal is not None
    assert ready.next_timer is None
    assert ready.connected(102.0) == ready.disconnected(103.0) == ready.tick(200.0) == []


def test_it_says_goodbye_only_where_it_is_welcome(link: Link) -> None:
    assert link.goodbye("done") == []
    link.connected(100.0)
    link.received(WELCOME, 100.0)
    assert said(link.goodbye("done")) == [m.Goodbye("done")]
