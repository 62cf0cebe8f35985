"""The worker's side: which replies go directly, and what is kept until they have arrived."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from broker.logs import log
from broker.protocol import messages as m
from worker.direct.backend import Backend, TransferError
from worker.direct.channel import Channel, ChannelState, Open
from worker.direct.config import ON_ONE_HOST, Choice, DirectConfig, host_id, split_address
from worker.direct.parts import octets
from worker.direct.rendezvous import End, Rendezvous
from worker.direct.runner import Ending, Move, Runner
from worker.direct.way import Way

_logger = logging.getLogger("draftmq.worker")
#: Channels that a worker keeps at most; the one that moved nothing for longest goes first.
_MAX_CHANNELS = 256


@dataclass(frozen=True)
class Plan:
    """How one reply travels: directly, or by wire and perhaps with an invitation."""

    transfer: m.Transfer | None = None
    invitation: m.Invitation | None = None


@dataclass(eq=False)
class _Peer:
    """One life of one client, and the channel to it."""

    incarnation: int
    #: what both ends can do, best first; the first is in use, and leaves when it is given up
    backends: list[str]
    #: the life that this one followed: what comes late of that is not sent directly any more
    former: int | None = None
    runner: Runner | None = None
    invitation: m.Invitation | None = None


class Sender:
    """All direct channels of one worker. The compute thread calls :meth:`plan` and :meth:`send`."""

    def __init__(
        self,
        config: DirectConfig,
        worker: str,
        device: torch.device | str,
        brokers: Sequence[str],
    ) -> None:
        self.config = config
        self._way = Way(config, device, brokers, _logger)
        #: where the peers' channels began
        self._address = self._way.choice.address
        self._worker = worker
        self._device = torch.device(device)
        self._rendezvous: Rendezvous | None = None
        self._peers: dict[str, _Peer] = {}
        self._ending = Ending()
        self._lock = threading.Lock()
        self._staged_bytes = 0

    @property
    def choice(self) -> Choice:
        """What this end can do now."""
        return self._way.choice

    def plan(self, request: m.Request, tensors: Mapping[str, Tensor]) -> Plan:
        """Decide how the reply to ``request`` travels; a transfer that is planned must be sent."""
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        choice = self._way.choice
        if request.direct is None or nbytes < self.config.min_bytes or not choice.backends:
            return Plan()
        if choice.address != self._address:
            self._move(choice.address)
        peer = self._peer(request.id, request.direct)
        runner = None if peer is None else self._runner(request.id.client, peer)
        if peer is None or runner is None:
            return Plan()
        room = self._staged_bytes + nbytes <= self.config.max_staged_bytes
        if room and (taken := runner.take_seq()) is not None:
            return Plan(transfer=m.Transfer(runner.core.name, *taken))
        return self._invite(peer, runner)

    def send(self, client: str, transfer: m.Transfer, tensors: Mapping[str, Tensor]) -> None:
        """Send what was planned, in the background."""
        peer = self._peers[client]
        assert peer.runner is not None
        flat = [octets(tensor) for tensor in tensors.values()]
        nbytes = sum(tensor.nbytes for tensor in flat)
        computed = torch.cuda.Event(blocking=True) if self._device.type == "cuda" else None
        if computed is not None:
            computed.record()
        self._stage(nbytes)

        def run(backend: Backend) -> None:
            try:
                if computed is not None:
                    computed.synchronize()  # of these kernels, not of the device
                backend.send(transfer.seq, flat, self.config.channel.limit_s)
            finally:
                flat.clear()
                self._stage(-nbytes)

        def failed(why: str) -> None:
            if flat:  # it was never begun
                flat.clear()
                self._stage(-nbytes)

        peer.runner.move(Move(transfer.epoch, run, failed))

    def close(self) -> None:
        """Free whoever waits and end all channels."""
        for client in list(self._peers):
            self._drop(client, "the worker leaves")
        self._ending.join()
        if self._rendezvous is not None:
            self._rendezvous.close()
            self._rendezvous = None

    def summary(self) -> str:
        """One line for operators: what was chosen and why, and how the channels are."""
        peers = list(self._peers.values())
        return self.choice.summary(peer.runner.core for peer in peers if peer.runner is not None)

    @property
    def staged_bytes(self) -> int:
        """Bytes kept for transfers that have not ended."""
        return self._staged_bytes

    # -- inside -----------------------------------------------------------------------------------

    def _peer(self, request: m.RequestId, offer: m.DirectOffer) -> _Peer | None:
        peer = self._peers.get(request.client)
        if peer is not None and peer.former == request.incarnation:
            return None
        if peer is None or peer.incarnation != request.incarnation:
            self._drop(request.client, "a newer life of the client")
            self._drop_idle()
            common = [name for name in self.choice.backends if name in offer.backends]
            if offer.host != host_id() or not offer.host:
                common = [name for name in common if name not in ON_ONE_HOST]
            peer = self._peers[request.client] = _Peer(
                request.incarnation, common, peer.incarnation if peer is not None else None
            )
        return peer

    def _runner(self, client: str, peer: _Peer) -> Runner | None:
        """The channel in use; when it was given up, that of the next backend, if there is one."""
        if peer.runner is not None and peer.runner.core.state is ChannelState.CLOSED:
            if len(peer.backends) == 1:
                return None
            peer.runner.close("given up")
            peer.runner = None
            del peer.backends[0]
        if peer.runner is None and peer.backends:
            name = f"{self._worker}/{client}/{peer.backends[0]}/{secrets.token_hex(4)}"
            core = Channel(name, self.config.channel)
            peer.runner = Runner(core, lambda epoch, leaving: self._join(peer, leaving), _logger)
        return peer.runner

    def _invite(self, peer: _Peer, runner: Runner) -> Plan:
        if not runner.core.may_open(time.monotonic()):
            return Plan()
        try:
            if self._rendezvous is None:
                self._rendezvous = Rendezvous(self._address, self.config.ports)
        except TransferError as error:
            self._way.give_up(str(error))
            log(_logger, "warning", "direct_off", {"why": str(error)})
            return Plan()
        host, port = self._rendezvous.address, self._rendezvous.port
        if self.config.advertise:
            host, other = split_address(self.config.advertise)
            port = other or port
        peer.invitation = m.Invitation(
            channel=runner.core.name,
            epoch=runner.core.epoch + 1,
            nonce=secrets.token_hex(16),
            backend=peer.backends[0],
            host=host,
            port=port,
        )
        runner.tell(Open(peer.invitation.epoch))
        return Plan(invitation=peer.invitation)

    def _join(self, peer: _Peer, leaving: threading.Event) -> Backend:
        assert peer.invitation is not None
        assert self._rendezvous is not None
        end = End(self._address, self._device, self.config.channel)
        return self._rendezvous.meet(peer.invitation, end, leaving)

    def _move(self, address: str) -> None:
        """This host has another address: all channels begin anew, from there."""
        for client in list(self._peers):
            self._drop(client, "the address of this host has changed")
        if self._rendezvous is not None:
            self._rendezvous.close()
            self._rendezvous = None
        self._address = address

    def _drop(self, client: str, why: str) -> None:
        peer = self._peers.pop(client, None)
        if peer is not None and peer.runner is not None:
            self._ending.close(peer.runner, why)

    def _drop_idle(self) -> None:
        """Let go of channels that nobody uses, and of the least used when there are too many."""
        now = time.monotonic()
        used = sorted(
            (peer.runner.used_at, client)
            for client, peer in self._peers.items()
            if peer.runner is not None
        )
        for number, (used_at, client) in enumerate(used):
            if now - used_at > self.config.idle_s or number <= len(used) - _MAX_CHANNELS:
                self._drop(client, f"idle for {now - used_at:.0f} s")

    def _stage(self, nbytes: int) -> None:
        with self._lock:
            self._staged_bytes += nbytes
