"""The worker's threads around its core: one for the sockets, and its pipeline.

The I/O thread goes on answering heartbeats while the target computes.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Sequence
from typing import Any

from broker.errors import BrokerError
from broker.keys.files import Role
from broker.keys.operators import door
from broker.logs import log
from broker.peer.credentials import KeyLike, credentials
from broker.peer.loop import PeerLoop
from broker.protocol import Limits
from broker.protocol.names import new_incarnation, own_name
from broker.watch.http import HttpServer
from broker.watch.pages import peer_pages
from worker.answers import Answerer, description
from worker.core import Drain, Exit, Log, WorkerCore
from worker.direct.config import DirectConfig
from worker.direct.sender import Sender
from worker.errors import TargetGoneError, WorkerError
from worker.metrics import METRICS, WorkerMeasures
from worker.pipeline import Pipeline
from worker.targets import as_target
from worker.targets.contract import ColocatedContract, Target, describe

_logger = logging.getLogger("draftmq.worker")
#: For what is on its way when a worker leaves at once.
_LINGER_S = 1.0
_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


class Worker:
    """A worker in threads of this process, serving ``target`` to one or several brokers.

    ``target`` is one of ours, or any object with the co-located contract
    (:class:`worker.targets.contract.ColocatedContract`).
    ``credits`` is how many requests a broker may give it at once: with 2 the next one is already
    here when one ends. ``coalesce_tokens`` lets requests that wait run in one forward of at most
    so many tokens (B*T, padded), which may change last bits; give credits for as many as should.
    :meth:`drain` (what SIGTERM does to the command) finishes what is held and
    leaves; :meth:`stop` leaves at once, and the broker gives its requests to others. ``direct``
    says how tensors may go to clients past the broker. ``http`` is ``HOST:PORT`` of ``/metrics``,
    ``/status`` and ``/healthz``, or None; where other machines reach it, it is for those who have
    the token in the file ``http_token``, or with ``none`` for anyone.

    ``key`` (a file) and ``broker_key`` (a file, or the key's text; one for all brokers or one for
    each) are for brokers that want keys; see :func:`broker.peer.credentials.credentials`.
    """

    def __init__(
        self,
        target: Target | ColocatedContract,
        broker: str | Sequence[str],
        *,
        model: str = "",
        name: str | None = None,
        credits: int = 2,
        drain_s: float = 30.0,
        coalesce_tokens: int = 0,
        direct: DirectConfig | None = None,
        http: str | None = None,
        http_token: KeyLike | None = None,
        key: KeyLike | None = None,
        broker_key: KeyLike | Sequence[KeyLike] | None = None,
    ) -> None:
        if credits < 1:
            raise ValueError(f"credits must be at least 1, got {credits}")
        if not 0 <= drain_s < math.inf:
            raise ValueError(f"drain_s must be finite and not negative, got {drain_s}")
        target = as_target(target, name=model)
        if coalesce_tokens and not getattr(target, "batchable", False):
            raise WorkerError(
                f"target {target.name!r} cannot run several requests in one forward; leave "
                "coalesce_tokens (--coalesce-tokens) away"
            )
        endpoints = [broker] if isinstance(broker, str) else list(broker)
        shown = credentials(Role.WORKER, endpoints, key, broker_key, _logger)
        name = name or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.name = own_name(name, shown.fingerprint)
        self.facts = describe(target, model)
        device = target.get_input_embeddings().weight.device
        self._sender = Sender(direct or DirectConfig(), self.name, device, endpoints)
        self.core = WorkerCore(
            self.name,
            new_incarnation(),
            description(self.facts),
            endpoints,
            time.monotonic(),
            credits=credits,
            drain_s=drain_s,
            coalesce_tokens=coalesce_tokens,
            note=self._sender.summary,
        )
        self.measures = WorkerMeasures()
        self._http_address = http
        self._http_token = http_token
        self._http: HttpServer | None = None
        #: asked to drain
        self.leaving = False
        self._left = threading.Event()
        self._error: str = ""
        self._loop = PeerLoop(
            "draftmq-worker", self.core, self._perform, self._thread_failed, _logger, shown.curves
        )
        if hasattr(target, "when_gone"):
            target.when_gone = self._thread_failed
        answerer = Answerer(target, self.facts, self.name, self._sender)
        self._pipeline = Pipeline(
            answerer, self.measures, self._limits, self._loop.post, self._thread_failed
        )

    def start(self) -> Worker:
        """Connect and serve.

        Raises :class:`WorkerError` when the HTTP port is not to be had, or is open to strangers.
        """
        if self._http_address is not None:
            try:
                admits = door(self._http_address, self._http_token)
                shown = peer_pages(METRICS, self.snapshot, lambda: self.trouble)
                self._http = HttpServer(self._http_address, shown, admits)
            except BrokerError as error:
                raise WorkerError(str(error)) from error
            self._http.start()
        _workers.add(self)
        self._pipeline.start()
        self._loop.start()
        return self

    def drain(self, reason: str = "asked to drain") -> None:
        """Finish what is held, take nothing new, leave. Returns at once: :meth:`wait` waits."""
        self.leaving = True
        self._loop.post(Drain(reason))

    def leave_now(self) -> None:
        """Have :meth:`wait` return; what is held goes back to the brokers."""
        self._left.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the worker has left; False when it is still there after ``timeout_s``.

        Raises :class:`WorkerError` when it was refused by every broker.
        """
        left = self._left.wait(timeout_s)
        if self._error:
            raise WorkerError(self._error)
        return left

    def stop(self) -> None:
        """Leave now. A running forward is waited for; its answer is not sent.

        The last answers of a worker that drained have the rest of its time to leave.
        """
        if self._http is not None:
            self._http.stop()
            self._http = None
        if self._loop.running:
            left_s = (self.core.leave_at or 0.0) - time.monotonic() if self.core.left else 0.0
            self._loop.stop(max(_LINGER_S, left_s))
        self._left.set()
        self._pipeline.stop()
        self._sender.close()

    @property
    def http_address(self) -> str | None:
        """``HOST:PORT`` of the HTTP server, if there is one."""
        return self._http.address if self._http else None

    @property
    def trouble(self) -> str:
        """Why no broker can give this worker anything just now; nothing where one can."""
        links = list(self.core.links.values())
        if any(link.ready for link in links):
            return ""
        return "; ".join(link.why_not_ready(time.monotonic()) for link in links)

    def snapshot(self) -> dict[str, Any]:
        """What ``/status`` and ``/metrics`` show; from any thread."""
        return {
            "worker": self.name,
            "model": self.facts.model,
            "brokers": {endpoint: link.state.value for endpoint, link in self.core.links.items()},
            "held": len(self.core.held),
            "computing": bool(self.core.computing),
            "draining": self.core.leave_at is not None,
            **self.measures.plain(),
        }

    def __enter__(self) -> Worker:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return repr(self.core)

    def _perform(self, action: Any) -> None:
        if isinstance(action, Log):
            log(_logger, action.level, action.event, action.fields)
        elif isinstance(action, Exit):
            self._error = action.error
            self._left.set()
        else:
            self._pipeline.do(action)

    def _thread_failed(self, error: BaseException) -> None:
        self._error = f"a thread of the worker broke: {error!r}"
        if isinstance(error, TargetGoneError):
            self._error = str(error)
            log(_logger, "error", "target_gone", {"error": self._error})
        self._left.set()

    def _limits(self) -> Limits:
        return min(
            (link.limits for link in self.core.links.values()),
            key=lambda limits: limits.max_reply_bytes,
        )


def _stop_all() -> None:
    for worker in list(_workers):
        worker.stop()


atexit.register(_stop_all)
