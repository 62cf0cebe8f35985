"""A peer's half of a connection: what it says when, and when it gives a broker up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.peer.link import Link, LinkState, Reopen, SendTo
from broker.protocol import messages as m

ENDPOINT = "tcp://b:5555"
HELLO = m.ClientHello("me", 1, "job", 0)
WELCOME = m.Welcome("b1", 4, 1.0, 5.0, 1 << 20, 8192, 64 << 20, 64 << 20, 4 << 30, ("o1",))


class Rig:
    """A link with its own clock, and what it has said."""

    def __init__(self) -> None:
        self.now = 50.0
        self.link = Link(ENDPOINT, lambda: HELLO, self.now, lambda: "a note")
        self.said: list[m.Message] = []
        self.reopened = 0

    def do(self, actions: list) -> None:
        for action in actions:
            if isinstance(action, SendTo):
                self.said.append(action.packet.message)
            else:
                assert action == Reopen(ENDPOINT)
                self.reopened += 1

    def connect(self) -> None:
        self.do(self.link.connected(self.now))

    def arrive(self, message: m.Message) -> None:
        self.do(self.link.received(message, self.now))

    def wait(self, seconds: float) -> None:
        """Let time pass, ticking when the link asks for it."""
        end = self.now + seconds
        while (due := self.link.next_timer) is not None and due <= end:
            self.now = max(self.now, due)
            self.do(self.link.tick(self.now))
        self.now = end
        self.do(self.link.tick(self.now))

    def welcomed(self) -> Rig:
        self.connect()
        self.arrive(WELCOME)
        self.said.clear()
        return self


def test_it_says_hello_when_connected_and_is_ready_when_welcomed() -> None:
    rig = Rig()
    assert rig.link.state is LinkState.DOWN
    rig.connect()
    assert rig.said == [HELLO]
    assert rig.link.state is LinkState.GREETING
    rig.arrive(WELCOME)
    assert rig.link.ready
    assert (rig.link.broker, rig.link.window, rig.link.offers) == ("b1", 4, ("o1",))
    assert rig.link.limits.max_frames == 8192


def test_a_hello_that_is_not_answered_is_said_again_at_each_heartbeat() -> None:
    rig = Rig()
    rig.connect()
    rig.wait(3.5)
    assert rig.said == [HELLO] * 4


def test_it_beats_as_the_welcome_says_with_its_note() -> None:
    rig = Rig().welcomed()
    for _ in range(6):
        rig.wait(0.5)
        rig.arrive(m.Heartbeat(2, "", ("o1", "o2")))
    assert rig.said == [m.Heartbeat(-1, "a note")] * 3
    assert (rig.link.workers, rig.link.offers) == (2, ("o1", "o2"))


def test_what_is_said_and_answered_stands_for_heartbeats() -> None:
    rig = Rig().welcomed()
    for _ in range(12):
        rig.wait(0.25)
        rig.link.spoke(rig.now)
        rig.arrive(m.Failure(m.RequestId("c", 1, 1), "expired", ""))
    assert rig.said == []
    rig.wait(1.0)
    assert len(rig.said) == 1


def test_a_broker_that_answers_nothing_is_asked_for_a_sign_of_life() -> None:
    rig = Rig().welcomed()
    for _ in range(12):
        rig.wait(0.25)
        rig.link.spoke(rig.now)
    assert len(rig.said) == 3


def test_who_is_always_busy_hears_now_and_then_who_serves_what() -> None:
    rig = Rig().welcomed()
    for _ in range(4 * 20):
        rig.wait(0.25)
        rig.link.spoke(rig.now)
        rig.arrive(m.Failure(m.RequestId("c", 1, 1), "expired", ""))
    assert len(rig.said) == 4  # every 5 s, its liveness


def test_silence_beyond_its_liveness_takes_it_down_and_any_message_keeps_it_up() -> None:
    rig = Rig().welcomed()
    for _ in range(10):
        rig.wait(4.0)
        rig.arrive(m.Cancel(m.RequestId("c", 1, 1)))  # none of its business, and a sign of life
    assert rig.link.ready
    rig.wait(4.9)
    assert rig.link.ready
    rig.wait(0.2)
    assert rig.link.state is LinkState.DOWN
    assert (rig.link.workers, rig.link.offers) == (-1, ())


def test_a_message_whose_end_has_not_come_is_a_sign_of_life() -> None:
    rig = Rig().welcomed()
    for _ in range(10):
        rig.wait(4.0)
        rig.link.moving(rig.now)
    assert rig.link.ready


def test_a_lost_connection_is_opened_anew_sooner_at_first_and_each_second_later() -> None:
    rig = Rig().welcomed()
    waits = []
    for _ in range(8):
        rig.do(rig.link.disconnected(rig.now, "it broke"))
        due = rig.link.next_timer
        assert due is not None
        waits.append(round(due - rig.now, 3))
        before = rig.reopened
        rig.wait(due - rig.now)
        assert rig.reopened == before + 1
    assert waits == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]
    assert rig.link.trouble == "it broke"
    rig.welcomed()
    assert rig.link.trouble == ""


def test_a_socket_that_never_connects_is_opened_anew_each_five_seconds() -> None:
    rig = Rig()
    rig.wait(21)
    assert rig.reopened == 4
    assert "no broker answers at tcp://b:5555 (21 s)" in rig.link.why_not_ready(rig.now)


def test_a_refusal_is_final() -> None:
    rig = Rig()
    rig.connect()
    rig.arrive(m.Refused("wrong_port", "the other one"))
    rig.said.clear()
    rig.do(rig.link.disconnected(rig.now))
    rig.connect()
    rig.wait(100)
    rig.arrive(WELCOME)
    assert rig.link.state is LinkState.REFUSED
    assert (rig.said, rig.reopened) == ([], 0)
    assert "refused this peer: the other one" in rig.link.why_not_ready(rig.now)


def test_a_broker_that_forgot_it_is_greeted_again_and_one_that_stops_is_left() -> None:
    rig = Rig().welcomed()
    rig.arrive(m.HelloWanted("b2"))
    assert rig.said == [HELLO]
    rig.arrive(m.Goodbye("the broker stops"))
    assert rig.link.state is LinkState.DOWN


def test_goodbye_is_said_only_to_who_knows_us() -> None:
    rig = Rig()
    rig.do(rig.link.goodbye("stopped"))
    assert rig.said == []
    rig.welcomed()
    rig.do(rig.link.goodbye("stopped"))
    assert rig.said == [m.Goodbye("stopped")]


@pytest.mark.parametrize(
    ("offers", "offer", "may"),
    [
        ((), "o1", True),  # nobody is there yet, and it may come
        (("o1",), "o1", True),
        (("o2",), "o1", False),
        (("o2",), "", True),
        (
            tuple(f"x{n}" for n in range(m.MAX_OFFERS)),
            "o1",
            True,
        ),  # or not named
    ],
)
def test_a_request_belongs_where_its_offer_is_or_may_come(
    offers: tuple[str, ...], offer: str, may: bool
) -> None:
    rig = Rig().welcomed()
    rig.arrive(m.Heartbeat(1, "", offers))
    assert rig.link.may_serve(offer) is may


_EVENTS = st.lists(
    st.sampled_from(
        ["connect", "cut", "welcome", "wanted", "beat", "goodbye", "refused", "wait", "long"]
    ),
    max_size=30,
)


@given(_EVENTS)
def test_whatever_happens_it_has_a_timer_or_is_refused(events: list[str]) -> None:
    """A link that waits for nothing would never come back."""
    rig = Rig()
    messages = {
        "welcome": WELCOME,
        "wanted": m.HelloWanted("b"),
        "beat": m.Heartbeat(0),
        "goodbye": m.Goodbye(""),
        "refused": m.Refused("code", "text"),
    }
    for event in events:
        if event == "connect":
            rig.connect()
        elif event == "cut":
            rig.do(rig.link.disconnected(rig.now))
        elif event in messages:
            rig.arrive(messages[event])
        else:
            rig.wait(0.3 if event == "wait" else 20.0)
        assert rig.link.next_timer is not None or rig.link.state is LinkState.REFUSED
