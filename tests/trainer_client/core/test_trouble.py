"""What a client says of a broker that gives it nothing."""

from __future__ import annotations

import pytest

from broker.peer.link import Link
from broker.protocol import messages as m
from broker.protocol.limits import Limits
from trainer_client.core.trouble import trouble

ENDPOINT = "tcp://broker:5555"


def told(*messages: m.Message) -> Link:
    """A link that is welcomed, and has heard these."""
    limits = Limits()
    welcome = m.Welcome(
        "b", 4, 1.0, 5.0,
        limits.max_header_bytes, limits.max_frames, limits.max_frame_bytes,
        limits.max_request_bytes, limits.max_reply_bytes,
    )  # fmt: skip
    link = Link(ENDPOINT, lambda: m.ClientHello("c", 1, "", 0), 0.0)
    link.connected(0.0)
    for message in (welcome, *messages):
        link.received(message, 0.0)
    return link


@pytest.mark.parametrize(
    ("beat", "said", "unsaid"),
    [
        (m.Heartbeat(0, "", ()), "start a draftmq worker", "--model"),
        (m.Heartbeat(0, "", ("offer",)), "is --model right?", "start a draftmq worker"),
    ],
)
def test_a_wrong_model_is_told_from_no_worker(beat: m.Heartbeat, said: str, unsaid: str) -> None:
    why = trouble(told(beat), 10.0)
    assert said in why
    assert ENDPOINT in why
    assert unsaid not in why


def test_nothing_is_said_of_a_broker_with_workers() -> None:
    assert trouble(told(m.Heartbeat(1, "", ("offer",))), 10.0, "offer") == ""
    assert trouble(told(), 10.0) == ""


def test_another_model_there_is_waited_out() -> None:
    why = trouble(told(m.Heartbeat(1, "", ("offer",))), 10.0, "another")
    assert "the workers at tcp://broker:5555 serve other models just now" in why
