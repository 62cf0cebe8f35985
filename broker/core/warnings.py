"""What an operator should look at, in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.core.machine import BrokerCore
    from broker.protocol.messages import Request


#: More than these nobody reads; a network that is gone silences all peers at once.
_SHOWN = 20


def warnings(core: BrokerCore, now: float) -> list[str]:
    """What is not as it should be, the worst first; nothing when all is well."""
    found = [*_missing(core), *_waiting(core, now), *_silent(core, now)]
    more = len(found) - _SHOWN
    return [*found[:_SHOWN], *([f"and {more} more"] if more > 0 else ())]


def _missing(core: BrokerCore) -> list[str]:
    if not core.workers:
        waiting = f"; {_requests(len(core.entries))}" if core.entries else ""
        return [f"no worker is attached{waiting}"]
    if all(worker.draining for worker in core.workers.values()):
        return ["every worker is leaving"]
    if core.poolless:
        names = ", ".join(sorted({_wanted(entry.request) for entry in core.poolless.values()}))
        return [f"{_requests(len(core.poolless))} for {names}: no worker serves that"]
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
        for mapping, entries in sorted(core.mappingless.items())
        if any(now - entry.accepted_at >= late for entry in entries.values())
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
