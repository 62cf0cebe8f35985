"""Looking at a broker core: its invariants, and what operators are shown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from broker.core.places import COUNTED
from broker.core.warnings import warnings

if TYPE_CHECKING:
    from broker.core.machine import BrokerCore
    from broker.core.measures import ModelMeasures
    from broker.core.pool import Pool
    from broker.core.state import ClientSession, WorkerSession


def validate(core: BrokerCore) -> None:
    """Check every invariant of the core; raises ``AssertionError``."""
    connected = [client for client in core.clients.values() if client.connection is not None]
    assert {client.connection: client for client in connected} == core.client_connections
    assert {w.connection: w for w in core.workers.values()} == core.worker_connections
    for client in core.clients.values():
        assert len(client.requests) <= core.config.window
        assert all(core.entries[request_id].client == client.id for request_id in client.requests)
    for offer, pool in core.pools.items():
        assert pool.description.offer == offer
        pool.choice.validate()
        pool.queue.validate()
        free = {worker for worker in pool.workers.values() if worker.free}
        assert set(pool.choice.free()) == free
        if len(pool.queue) and any(not worker.running for worker in free):
            # liveness: who waits beside an idle worker waits for a better one, and for so long
            assert core.next_timer is not None
            assert core.next_timer <= pool.looks_at < math.inf
        assert all(core.workers[worker.id] is worker for worker in pool.workers.values())
    for worker in core.workers.values():
        assert core.pools[worker.offer].workers[worker.id] is worker
        assert worker.free >= 0
        replies = [core.entries[request_id].passing for request_id in worker.passing]
        assert all(reply is not None and not reply.complete for reply in replies)
    for request_id, entry in core.entries.items():
        assert entry.id == request_id
        assert request_id not in core.answers
        assert all(request_id in core.workers[worker].running for worker in entry.workers)
        if (passing := entry.passing) is not None:
            assert passing.complete or request_id in core.workers[passing.worker].passing
            assert core.clients[entry.client].connection is not None
            assert request_id in core.clients[entry.client].requests
    assert {id_ for id_, e in core.entries.items() if e.suspects} <= set(core.orphaned)
    assert core.orphaned.items() <= core.entries.items()
    assert core.suspected.keys() <= core.orphaned.keys()
    core.places.validate()
    core.timers.validate()
    assert core.hedged == {id_ for id_, entry in core.entries.items() if entry.hedge}
    for each in (
        core.request_room,
        core.waiting_for_request_room,
        core.reply_room,
        core.waiting_for_reply_room,
    ):
        each.validate()
    kept = {request_id: e.nbytes for request_id, e in core.entries.items() if e.packet is not None}
    kept |= {request_id: e.nbytes for request_id, e in core.recalled.items()}
    assert core.request_room.taken_bytes == sum(kept.values())
    core.mappings.validate()
    core.answers.validate()


def snapshot(core: BrokerCore, now: float) -> dict[str, Any]:
    """What ``/status`` and ``draftmq status`` show: plain values, nothing of any tensor.

    ``now_s`` is the clock that all its rates should be taken over. A client's ``step`` is that
    of its first unfinished request.
    """
    running = Counter(entry.pool for entry in core.entries.values() if entry.under_way)
    return {
        "broker": core.incarnation,
        "now_s": now,
        "requests": {
            "running": running.total(),
            "queued": sum(len(pool.queue) for pool in core.pools.values()),
            "without_worker": len(core.waiting_for_pool),
            "without_mapping": sum(len(waiting) for waiting in core.waiting_for_mapping.values()),
        },
        "places": {place.name.lower(): core.places.counts[place] for place in COUNTED},
        "models": dict(sorted(_models(core, running))),
        "measures": {name: _measured(of) for name, of in sorted(core.measures.models.items())},
        "workers": [_worker(worker, now) for _, worker in sorted(core.workers.items())],
        "clients": [_client(core, client, now) for _, client in sorted(core.clients.items())],
        "held_answers": len(core.answers),
        "held_answer_bytes": core.answers.held_bytes,
        "held_mapping_bytes": core.mappings.held_bytes,
        "counters": dict(core.counters),
        "warnings": warnings(core, now),
    }


def _models(core: BrokerCore, running: Counter[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """By name; of several offers of one name, those without a worker say which they are."""
    for offer, pool in core.pools.items():
        name = pool.description.model
        alone = pool.workers or core.pools_called(name) == [pool]
        yield name if alone else f"{name} ({offer[:8]})", _model(pool, running[offer])


def _model(pool: Pool, running: int) -> dict[str, Any]:
    return {
        "offer": pool.description.offer,
        "fingerprint": pool.description.fingerprint,
        "encodings": list(pool.description.encodings),
        "workers": len(pool.workers),
        "queued": len(pool.queue),
        "running": running,
    }


def _measured(of: ModelMeasures) -> dict[str, Any]:
    return {
        "tokens": of.tokens,
        "queue_wait_s": of.queue_wait_s.plain(),
        "service_s": of.service_s.plain(),
        "compute_s": of.compute_s.plain(),
    }


def _worker(worker: WorkerSession, now: float) -> dict[str, Any]:
    return {
        "worker": worker.id,
        "model": worker.model,
        "state": "draining" if worker.draining else "busy" if worker.running else "idle",
        "running": len(worker.running),
        "credits": worker.credits,
        "answered": worker.answered,
        "direct": worker.direct,
        "tokens_per_s": 1 / worker.seconds_per_token if worker.seconds_per_token else None,
        "silent_s": round(now - worker.last_seen, 3),
    }


def _client(core: BrokerCore, client: ClientSession, now: float) -> dict[str, Any]:
    first = min(client.requests, key=attrgetter("number"), default=None)
    return {
        "client": client.id,
        "job": client.job,
        "rank": client.rank,
        "requests": len(client.requests),
        "step": None if first is None else core.entries[first].step,
        "answered": client.answered,
        "direct": client.direct,
        "connected": client.connection is not None,
        "silent_s": round(now - client.last_seen, 3),
    }
