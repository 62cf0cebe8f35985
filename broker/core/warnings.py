"""What an operator should look at, in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.core.places import COUNTED, Place

if TYPE_CHECKING:
    from broker.core.machine import BrokerCore
    from broker.core.state import Entry
    from broker.protocol.messages import Request


#: More than these nobody reads; a network that is gone silences all peers at once.
_SHOWN = 20
#: A request that stands in one place for longer deserves a look: three times what it may be passed
#: over for. One that runs is watched by its worker's speed, and a large reply takes its time.
DEFAULT_LONG_S = 30.0
LONG_S = {Place.RUNNING: 120.0, Place.PASSING: 120.0}


def warnings(core: BrokerCore, now: float) -> list[str]:
    """What is not as it should be, the worst first; nothing when all is well."""
    found = [
        *_missing(core),
        *_waiting(core, now),
        *_standing(core, now),
        *_shared_names(core),
        *_silent(core, now),
    ]
    more = len(found) - _SHOWN
    return [*found[:_SHOWN], *([f"and {more} more"] if more > 0 else ())]


def _missing(core: BrokerCore) -> list[str]:
    if not core.workers:
        waiting = f"; {_requests(len(core.entries))}" if core.entries else ""
        return [f"no worker is attached{waiting}"]
    if all(worker.draining for worker in core.workers.values()):
        return ["every worker is leaving"]
    if core.waiting_for_pool:
        names = ", ".join(
            sorted({_wanted(entry.request) for entry in core.waiting_for_pool.values()})
        )
        return [f"{_requests(len(core.waiting_for_pool))} for {names}: no worker serves that"]
    return []


def _wanted(request: Request) -> str:
    if request.offer:
        return f"the offer {request.offer[:8]}"
    return repr(request.model) if request.model else "no model by name"


def _waiting(core: BrokerCore, now: float) -> list[str]:
    late = core.config.liveness_s
    return [
        f"{_requests(len(entries))} for the content of vocab mapping {mapping}, which no trainer "
        "has offered"
        for mapping, entries in sorted(core.waiting_for_mapping.items())
        if any(now - entry.accepted_at >= late for entry in entries.values())
    ]


def _standing(core: BrokerCore, now: float) -> list[str]:
    """For each place the requests that have been there for long, and the cause of the oldest."""
    late: dict[Place, list[Entry]] = {}
    for entry in core.entries.values():
        limit_s = LONG_S.get(entry.place, DEFAULT_LONG_S)
        if now - entry.place_since >= limit_s:
            late.setdefault(entry.place, []).append(entry)
    found = []
    for place in COUNTED:
        if entries := late.get(place):
            oldest = min(entries, key=lambda entry: entry.place_since)
            count = "1 request is" if len(entries) == 1 else f"{len(entries)} requests are"
            found.append(
                f"{count} {place.value} for up to {now - oldest.place_since:.0f} s: "
                f"{oldest.why or _why_queued(core, oldest)}"
            )
    return found


def _why_queued(core: BrokerCore, entry: Entry) -> str:
    workers = core.pools[entry.pool].workers.values() if entry.pool else ()
    overdue = sum(bool(worker.overdue) for worker in workers)
    draining = sum(worker.draining for worker in workers)
    return (
        f"of {len(workers)} worker(s) {overdue} have an overdue request and {draining} leave, "
        "the others are busy with requests that come first"
    )


def _shared_names(core: BrokerCore) -> list[str]:
    """Runs that use one name for their job: they share what one of them should have."""
    ranks: dict[tuple[str, int], list[str]] = {}
    for client in core.clients.values():
        if client.connection is not None and client.rank >= 0:
            ranks.setdefault((client.job, client.rank), []).append(client.id)
    doubled: dict[str, list[str]] = {}
    for (job, rank), names in sorted(ranks.items()):
        if len(names) > 1:
            doubled.setdefault(job, []).append(f"rank {rank}: {', '.join(sorted(names))}")
    return [
        f"job {job} has {len(twice)} rank(s) twice, so several runs share its name and its part of "
        f"the workers ({twice[0]}); give each its own --job"
        for job, twice in doubled.items()
    ]


def _silent(core: BrokerCore, now: float) -> list[str]:
    """Peers that have missed their heartbeats for half the time after which they are lost."""
    limit = core.config.liveness_s
    found = []
    for worker in sorted(core.workers.values(), key=lambda worker: worker.id):
        if (silent := now - worker.last_seen) >= limit / 2:
            found.append(f"worker {worker.id} is silent for {silent:.1f} s, lost at {limit:g} s")
    for client in sorted(core.clients.values(), key=lambda client: client.id):
        silent = now - client.last_seen
        if client.connection is None:
            found.append(f"trainer {client.id} (rank {client.rank}) is not connected")
        elif silent >= limit / 2:
            found.append(
                f"trainer {client.id} (rank {client.rank}) is silent for {silent:.1f} s, lost at "
                f"{limit:g} s"
            )
    return found


def _requests(count: int) -> str:
    return "1 request waits" if count == 1 else f"{count} requests wait"
