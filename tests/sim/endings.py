"""What must hold when a request ends, when the faults have stopped, and when everyone has left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broker.peer.link import LinkState
from broker.protocol import messages as m
from tests.sim.actors import Ask, ClientProcess
from tests.sim.footprint import footprint
from tests.sim.violation import require
from trainer_client.core import Deliver, Fail

if TYPE_CHECKING:
    from tests.sim.world import World

#: After the last fault, a request that is wanted for so much longer must end in a result: patience
#: with a silent peer, a reconnect, a resend, and the work of all requests in a row.
RECOVERY_S = 40.0
#: Beside rude peers an honest request of a tenth of a second takes no longer, ten others included.
SERVED_S = 3.0


def check_ending(
    world: World, client: ClientProcess, ask: Ask | None, action: Deliver | Fail
) -> None:
    """A caller is told how its request ended."""
    require(ask is not None, "nobody asked", f"{client} was told of {action.id}")
    assert ask is not None
    require(ask.client is client, "another's request", f"{client} was told of {action.id}")
    require(not ask.ended, "ended twice", f"{action.id}: {ask.ended}, then {action}")
    require(not ask.cancelled, "ended after cancel", action.id)
    if isinstance(action, Deliver):
        reply = action.packet.message
        require(
            action.octets[0].tobytes() == ask.expected and reply.id == ask.id,  # type: ignore[union-attr]
            "another's tensors",
            f"{action.id} was given the bytes of another request, or damaged ones",
        )
        require(ask.nature in ("ok", "flaky"), "impossible result", f"{ask.nature} request")
    else:
        why = _unexplained(world, ask, action)
        require(not why, f"unexplained {action.code}", f"{action.id}, {ask.nature}: {why}")


def _unexplained(world: World, ask: Ask, failure: Fail) -> str:
    """What speaks against this error, or nothing."""
    seen = world.seen
    late = ask.client.now >= ask.deadline
    patient = not late or _had_time(world, ask)
    leftover = ask.client in world.leftovers
    explained = {
        "bad_request": ask.nature == "bad",
        "target_failed": ask.nature in ("failing", "flaky"),
        "lost_workers": ask.nature in ("deadly", "failing") or _losses(world) >= 2,
        "deadline": late and not patient,
        "expired": late or "jump" in seen,
        "refused": leftover,
    }
    if explained.get(failure.code, False):
        return ""
    return f"{failure.text} (faults seen: {seen}, late: {late}, had time: {patient})"


def _losses(world: World) -> int:
    """How often a worker may have been taken for dead."""
    return sum(1 for op in world.schedule.ops if op.kind not in ("start", "submit")) + (
        world.seen.get("loss", 0)
    )


def _had_time(world: World, ask: Ask) -> bool:
    """It was still wanted for long enough after the last fault, and someone could serve it."""
    return (
        ask.healed_with_s is not None
        and ask.healed_with_s >= RECOVERY_S
        and ask.client not in world.leftovers
        and ask.nature != "unmapped"
        and bool(world.brokers)
        and ask.served_by({w.core.description.model for w in world.workers.values()})
    )


def check_served(world: World, ask: Ask) -> None:
    """What rude peers do, an honest request of another model has its result within seconds."""
    took_s = world.now - ask.submitted_at
    undisturbed = {"start", "submit", "rude"}.issuperset(op.kind for op in world.schedule.ops)
    if not world.rude_names or not undisturbed or ask.nature != "ok":
        return
    require(ask.ended == "result", "spoilt by the rude", f"{ask.id} ended as {ask.ended}")
    require(took_s <= SERVED_S, "held up by the rude", f"{ask.id} took {took_s:.1f} s")


def check_all_ended(world: World) -> None:
    left = sorted(ask.label for ask in world.unfinished)
    require(not left, "never ended", f"requests {left} have not ended")


def check_drained(world: World) -> None:
    require(not (what := restless(world)), "does not drain", what)


def restless(world: World) -> str:
    """What is still there of requests that have all ended, or nothing."""
    for broker in world.brokers.values():
        core = broker.core
        if core.entries or core.waiting_for_pool or core.waiting_for_mapping:
            return f"{broker} still has {list(map(str, core.entries))}"
        if any(worker.running for worker in core.workers.values()):
            return f"{broker} counts requests as running on {core.workers.values()}"
        if any(len(pool.queue) for pool in core.pools.values()):
            return f"{broker} has a queue"
        for client in world.clients.values():
            kept = [str(i) for i in _answer_ids(world, client) if i in core.answers]
            if kept:
                return f"{broker} still holds answers to {kept}"
    for worker in world.workers.values():
        if worker.core.held:
            return f"{worker} still holds {list(map(str, worker.core.held))}"
    for leftover in world.leftovers:
        if leftover.alive and not _fenced(world, leftover):
            return f"{leftover} was not fenced off by {leftover.name}"
    return ""


def _answer_ids(world: World, client: ClientProcess) -> list[m.RequestId]:
    asks = world.asks.values()
    return [ask.id for ask in asks if ask.client is client]


def _fenced(world: World, leftover: Any) -> bool:
    links = leftover.core.links
    return all(links[name].state is LinkState.REFUSED for name in world.brokers)


def check_forgotten(world: World) -> None:
    """Nobody is there any more: a broker is as it was when it began, but for bounded stores."""
    for broker in world.brokers.values():
        sizes = footprint(broker.core)
        fresh = footprint(type(broker.core)(broker.core.incarnation, broker.core.config))
        stores = ("answers", "mappings", "counters")
        kept = {n: size for n, size in sizes.items() if size > fresh[n] and n not in stores}
        require(not kept, "not forgotten", f"{broker} keeps {kept} of peers that have left")
        timer = broker.core.next_timer
        require(timer is None, "leaked timer", f"{broker} still wakes at {timer}")
