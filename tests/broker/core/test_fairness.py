"""What each client, job and request is promised."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from broker.core.events import Side
from broker.core.inspect import snapshot
from broker.protocol import Packet, encode
from broker.protocol import messages as m
from tests.broker.core.rig import Rig, mapping_offer


def serve(rig: Rig, seconds: float, after: Callable[[m.RequestId], None]) -> dict[str, int]:
    """Have worker ``w`` answer one request every 0.5 s; how many each client got."""
    got: dict[str, int] = {}
    end = rig.now + seconds
    while rig.now < end:
        alive = [(Side.CLIENT, name) for name in rig.core.clients] + [(Side.WORKER, "w")]
        rig.pass_time(0.5, *alive)
        for asked in list(rig.core.workers["w"].running)[:1]:
            rig.reply("w", asked, compute_s=0.5)
            rig.from_client(asked.client, m.Received((asked,)))
            got[asked.client] = got.get(asked.client, 0) + 1
            after(asked)
    return got


def test_a_late_step_is_not_passed_over_for_more_than_ten_seconds() -> None:
    rig = Rig()
    rig.worker("w")
    rig.client("early")
    rig.client("late")
    numbers = iter(range(1, 10_000))
    for _ in range(4):
        rig.ask("early", next(numbers), step=0, ttl_s=500.0)
    waits = rig.ask("late", next(numbers), step=1000, ttl_s=500.0)
    began, ended = rig.now, []

    def ask_again(asked: m.RequestId) -> None:
        if asked == waits:
            ended.append(rig.now)
        else:
            rig.ask("early", next(numbers), step=0, ttl_s=500.0)

    serve(rig, 14.0, ask_again)
    assert ended
    assert 10.0 <= ended[0] - began <= 12.0


def test_two_runs_of_one_job_name_both_go_on_and_are_warned_of() -> None:
    rig = Rig()
    rig.worker("w")
    steps = {"old": 10_000, "new": 0}
    numbers = iter(range(1, 10_000))

    def ask(client: str) -> None:
        rig.ask(client, next(numbers), step=steps[client], ttl_s=500.0)
        steps[client] += 1

    for name in steps:
        rig.client(name, job="run")
        for _ in range(4):
            ask(name)
    got = serve(rig, 60.0, lambda asked: ask(asked.client))
    assert got["old"] >= 15
    assert got["new"] >= 15
    (warning,) = [w for w in snapshot(rig.core, rig.now)["warnings"] if "job run" in w]
    assert "new, old" in warning


def test_jobs_share_by_the_tokens_of_their_tensors() -> None:
    rig = Rig()
    rig.worker("w")
    spec = (m.TensorSpec("input_ids", "int64", (1, 100), 1),)
    numbers = iter(range(1, 10_000))

    def ask(client: str) -> None:
        claimed = 1 if client == "liar" else 100
        fields = ("generate", "", 0, claimed, "", "probs", 500.0, spec)
        request = m.Request(rig.id(client, next(numbers)), *fields)  # type: ignore[arg-type]
        rig.from_client(client, _with_payload(request))

    for name in ("liar", "honest"):
        rig.client(name, job=name)
        for _ in range(4):
            ask(name)
    got = serve(rig, 20.0, lambda asked: ask(asked.client))
    assert abs(got["liar"] - got["honest"]) <= 2


def test_two_jobs_share_equally_where_the_store_keeps_one_mapping() -> None:
    offers = {"a": mapping_offer(1, 2, 3), "b": mapping_offer(4, 5, 6)}
    rig = Rig(held_mapping_bytes=offers["a"].nbytes + 10)
    rig.worker("w")
    numbers = iter(range(1, 10_000))

    def ask(client: str) -> None:
        offer = offers[client].message
        assert isinstance(offer, m.MappingOffer)
        rig.ask(client, next(numbers), step=0, ttl_s=500.0, mapping_id=offer.mapping_id)

    def tell() -> None:
        for client, offer in offers.items():
            if rig.got(client, m.MappingWanted):
                rig.from_client(client, offer)

    for name in offers:
        rig.client(name, job=name)
        for _ in range(4 if name == "a" else 1):
            ask(name)
        tell()

    def after(asked: m.RequestId) -> None:
        tell()  # what was wanted before this: an offer takes its time
        ask(asked.client)

    got = serve(rig, 40.0, after)
    assert abs(got["a"] - got["b"]) <= 0.2 * got["a"]


def _with_payload(request: m.Request) -> Packet:
    return encode(request, [bytes(800)])


@pytest.mark.parametrize("place", ["queued", "reply_room", "mapping"])
def test_a_request_that_stands_for_long_is_a_warning_with_its_cause(place: str) -> None:
    room = {"max_client_bytes": 1000} if place == "reply_room" else {}
    rig = Rig(hedge_after=0.0, **room)
    rig.client("c")
    rig.worker("w", credits=1 if place == "queued" else 16)
    for number in range(6):
        mapping = "m" * 32 if place == "mapping" else ""
        rig.ask("c", number, ttl_s=500.0, mapping_id=mapping)
    rig.pass_time(31.0, (Side.CLIENT, "c"), (Side.WORKER, "w"))
    seen = snapshot(rig.core, rig.now)
    assert seen["places"][place] >= 1
    assert sum(seen["places"].values()) == 6
    causes = {
        "queued": "busy with requests that come first",
        "reply_room": "has enough",
        "mapping": "not come",
    }
    assert any(causes[place] in warning for warning in seen["warnings"])
