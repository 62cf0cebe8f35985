"""What the broker does about tensors that go past it."""

from __future__ import annotations

import pytest

from broker.protocol import Packet, encode
from broker.protocol import messages as m
from tests.broker.core.rig import Rig

TRANSFER = m.Transfer("w/c", 1, 0)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def direct_reply(rig: Rig, worker: str, client: str, number: int) -> Packet:
    reply = m.Reply(
        rig.id(client, number),
        worker,
        "tiny",
        "f0",
        (1, 3, 4),
        0,
        "",
        "probs",
        1.0,
        "",
        (),
        TRANSFER,
    )
    packet = encode(reply)
    rig.from_worker(worker, packet)
    return packet


def test_a_direct_reply_is_passed_on_and_never_again(rig: Rig) -> None:
    rig.client("c")
    rig.worker("w")
    rig.ask("c", 1)
    packet = direct_reply(rig, "w", "c", 1)
    assert rig.got("c")[-1] == packet.message
    assert len(rig.core.answers) == 0
    rig.got("w")
    rig.ask("c", 1)  # its resend is computed anew
    assert [message.id.number for message in rig.got("w")] == [1]
    assert rig.core.counters["direct_replies"] == 1


def test_a_client_is_told_of_a_transfer_that_it_no_longer_wants(rig: Rig) -> None:
    rig.client("c")
    rig.worker("w")
    rig.ask("c", 1)
    rig.from_client("c", m.Cancel(rig.id("c", 1)))
    rig.got("c")
    packet = direct_reply(rig, "w", "c", 1)
    assert rig.got("c") == [packet.message]
    assert rig.core.counters["late_answers"] == 1


def test_a_late_transfer_of_an_earlier_life_is_nobodys(rig: Rig) -> None:
    rig.client("c")
    rig.worker("w")
    rig.ask("c", 1)
    late = rig.id("c", 1)
    rig.client("c", incarnation=2, connection="c-again")
    rig.got("c-again")
    reply = m.Reply(late, "w", "tiny", "f0", (1, 3, 4), 0, "", "probs", 1.0, "", (), TRANSFER)
    rig.from_worker("w", encode(reply))
    assert rig.got("c-again") == []


@pytest.mark.parametrize("avoided", ["w1", "w2"])
def test_a_request_avoids_the_worker_whose_transfer_failed(rig: Rig, avoided: str) -> None:
    rig.client("c")
    rig.worker("w1")
    rig.worker("w2")
    rig.ask("c", 1, avoid=avoided)
    other = {"w1": "w2", "w2": "w1"}[avoided]
    assert [type(message) for message in rig.got(other)][-1] is m.Request


def test_a_request_goes_to_the_worker_it_avoids_rather_than_nowhere(rig: Rig) -> None:
    rig.client("c")
    rig.worker("w1")
    rig.ask("c", 1, avoid="w1")
    assert [type(message) for message in rig.got("w1")][-1] is m.Request


def test_what_peers_say_of_their_channels_is_shown(rig: Rig) -> None:
    rig.client("c")
    rig.worker("w")
    rig.from_client("c", m.Heartbeat(-1, "gloo (tensors on cpu)"))
    rig.from_worker("w", m.Heartbeat(-1, "off (--direct off)"))
    assert rig.core.clients["c"].direct == "gloo (tensors on cpu)"
    assert rig.core.workers["w"].direct == "off (--direct off)"
