"""The client's side of direct transfers: it joins channels when invited, and receives in order."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from broker.peer.tensors import shaped
from broker.protocol import messages as m
from worker.direct.backend import Backend
from worker.direct.channel import Announced, Channel, Open, Receive, Reject
from worker.direct.config import Choice, DirectConfig, host_id
from worker.direct.rendezvous import End, join
from worker.direct.runner import Ending, Move, Runner
from worker.direct.way import Way

_logger = logging.getLogger("draftmq.client")
#: Told how a transfer ended: its tensors, or why it failed. May be told a failure twice.
Done = Callable[[dict[str, Tensor] | None, str], None]


@dataclass(eq=False)
class _Peer:
    """The channel with one worker, and what is announced on it."""

    runner: Runner
    invitation: m.Invitation
    announced: dict[tuple[int, int], tuple[m.Reply, Done]]


class Receiver:
    """All direct channels of one client. The I/O thread alone calls it, but for :meth:`close`."""

    def __init__(
        self, config: DirectConfig, device: torch.device | str, brokers: Sequence[str]
    ) -> None:
        self.config = config
        self._way = Way(config, device, brokers, _logger)
        self._device = torch.device(device)
        #: by the worker's name: it has one channel with us at a time
        self._peers: dict[str, _Peer] = {}
        self._ending = Ending()

    @property
    def choice(self) -> Choice:
        """What this end can do now."""
        return self._way.choice

    @property
    def offer(self) -> m.DirectOffer | None:
        """What requests say of this end; None when it takes the wire only."""
        if not self.choice.backends:
            return None
        return m.DirectOffer(self.choice.backends, host_id())

    def invited(self, worker: str, invitation: m.Invitation) -> None:
        """A reply brought an invitation: join in the background."""
        if invitation.backend not in self.choice.backends:
            return
        peer = self._peers.get(worker)
        if peer is None or peer.invitation.channel != invitation.channel:
            self._drop(worker, "the worker began another channel")
            self._drop_idle()
            peer = self._peers[worker] = self._new_peer(invitation)
        if invitation.epoch > peer.invitation.epoch:
            peer.invitation = invitation
        peer.runner.tell(Open(invitation.epoch))

    def receive(self, reply: m.Reply, done: Done) -> None:
        """A reply says that its tensors come directly; ``done`` is told in any thread."""
        assert reply.transfer is not None
        transfer = reply.transfer
        peer = self._peers.get(reply.worker)
        if peer is None or peer.invitation.channel != transfer.channel:
            done(None, f"there is no channel {transfer.channel} here")
            return
        if (transfer.epoch, transfer.seq) in peer.announced:
            done(None, "it was announced before")
            return
        peer.announced[transfer.epoch, transfer.seq] = (reply, done)
        peer.runner.tell(Announced(transfer.epoch, transfer.seq))

    def close(self) -> None:
        """Free whoever waits and end all channels."""
        for worker in list(self._peers):
            self._drop(worker, "the client leaves")
        self._ending.join()

    def summary(self) -> str:
        """One line for operators: what was chosen and why, and how the channels are."""
        return self.choice.summary(peer.runner.core for peer in list(self._peers.values()))

    # -- inside -----------------------------------------------------------------------------------

    def _new_peer(self, invitation: m.Invitation) -> _Peer:
        def connect(epoch: int, leaving: threading.Event) -> Backend:
            end = End(self.choice.address, self._device, self.config.channel)
            return join(peer.invitation, end, leaving)

        def begin(action: Receive) -> None:
            reply, done = peer.announced.pop((action.epoch, action.seq))
            peer.runner.move(self._move(action, reply, done))

        def reject(action: Reject) -> None:
            if (announced := peer.announced.pop((action.epoch, action.seq), None)) is not None:
                announced[1](None, action.why)

        core = Channel(invitation.channel, self.config.channel)
        peer = _Peer(Runner(core, connect, _logger, begin, reject), invitation, {})
        return peer

    def _move(self, action: Receive, reply: m.Reply, done: Done) -> Move:
        sizes = [spec.nbytes for spec in reply.manifest]

        def run(backend: Backend) -> None:
            received = backend.receive(action.seq, sizes, self.config.channel.limit_s)
            pairs = zip(reply.manifest, received, strict=True)
            done({spec.name: shaped(octets, spec) for spec, octets in pairs}, "")

        return Move(action.epoch, run, lambda why: done(None, why))

    def _drop(self, worker: str, why: str) -> None:
        peer = self._peers.pop(worker, None)
        if peer is not None:
            self._ending.close(peer.runner, why)

    def _drop_idle(self) -> None:
        now = time.monotonic()
        for worker, peer in list(self._peers.items()):
            if now - peer.runner.used_at > self.config.idle_s:
                self._drop(worker, f"idle for {now - peer.runner.used_at:.0f} s")
