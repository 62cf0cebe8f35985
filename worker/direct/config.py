"""What can be set about direct transfers, and which backend two ends can both use."""

from __future__ import annotations

import functools
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from broker.keys.addresses import is_loopback
from broker.numbers import check_numbers
from broker.protocol.limits import GIB, MIB
from worker.direct.channel import Channel, ChannelConfig, ChannelState

if TYPE_CHECKING:
    import torch

_MAX_SUMMARY = 500
#: What ``--direct`` may say.
MODES = ("auto", "ipc", "nccl", "shm", "gloo", "off")
#: Backends whose two ends must be on one host.
ON_ONE_HOST = ("ipc", "shm")


@dataclass(frozen=True)
class DirectConfig:
    """One end's settings, each default with its reason."""

    #: ``auto`` takes the best of what both ends can do; a backend's name allows that one only.
    mode: str = "auto"
    #: The address of the interface that transfers use, or ``auto`` for the one that reaches the
    #: broker. Empty: loopback if the broker is there, else no direct transfers, because tensors
    #: travel in the clear and whoever reaches the port can end a process.
    address: str = ""
    #: ``HOST`` or ``HOST:PORT`` that trainers connect to for the rendezvous, where that is not the
    #: address itself: containers with mapped ports.
    advertise: str = ""
    #: First and last port for a worker's rendezvous store; 0, 0: any.
    ports: tuple[int, int] = (0, 0)
    #: Smaller replies go by wire: below this a round trip costs more than the copy saves.
    min_bytes: int = 1 * MIB
    #: Tensors that a worker keeps for transfers that have not ended; above it, replies go by wire.
    max_staged_bytes: int = 1 * GIB
    #: A channel that moved nothing for so long is let go, with its threads and connections.
    idle_s: float = 600.0
    channel: ChannelConfig = field(default_factory=ChannelConfig)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"direct must be one of {', '.join(MODES)}, got {self.mode!r}")
        first, last = self.ports
        if not 0 <= first <= last < 1 << 16:
            raise ValueError(f"direct ports must be FIRST-LAST within 0-65535, got {first}-{last}")
        if self.advertise:
            split_address(self.advertise)
        check_numbers(self, above_0="min_bytes max_staged_bytes idle_s")


@dataclass(frozen=True)
class Choice:
    """What one end decided at its start: its backends, best first, or why there is none."""

    backends: tuple[str, ...]
    address: str
    why: str

    def __str__(self) -> str:
        return f"{','.join(self.backends) or 'off'} ({self.why})"

    def summary(self, channels: Iterable[Channel]) -> str:
        """One line for operators: the choice, how its channels are, and what ails them."""
        channels = list(channels)
        states = Counter(channel.state.value for channel in channels)
        ails = {c.why for c in channels if c.why and c.state is not ChannelState.READY}
        counted = [f"{number} {state}" for state, number in sorted(states.items())]
        return "; ".join([str(self), *counted, *sorted(ails)])[:_MAX_SUMMARY]


def choose(config: DirectConfig, device: torch.device | str, endpoints: Sequence[str]) -> Choice:
    """What this end can do with tensors on ``device``, near these brokers."""
    if config.mode == "off":
        return Choice((), "", "--direct off")
    address, why = _address(config, endpoints)
    if not address:
        return Choice((), "", why)
    possible = _backends(str(device))
    if config.mode == "auto":
        return Choice(possible, address, f"tensors on {device}, {why}")
    if config.mode not in possible:
        return Choice((), "", f"--direct {config.mode} cannot move tensors on {device}")
    return Choice((config.mode,), address, f"--direct {config.mode}, {why}")


def split_address(text: str) -> tuple[str, int]:
    """``HOST`` or ``HOST:PORT`` in two; port 0 where none is said. Raises ``ValueError``."""
    try:
        parsed = urlsplit(f"//{text}")
        host, port = parsed.hostname, parsed.port or 0
    except ValueError as error:
        raise ValueError(f"{text!r} is no HOST or HOST:PORT: {error}") from None
    if not host:
        raise ValueError(f"{text!r} is no HOST or HOST:PORT")
    return host, port


def _backends(device: str) -> tuple[str, ...]:
    import torch.distributed as dist

    from worker.direct import segment

    names = []
    if device.startswith("cuda"):
        names.append("ipc")
        if dist.is_nccl_available():
            names.append("nccl")
    if segment.possible():
        names.append("shm")
    if dist.is_gloo_available():
        names.append("gloo")
    return tuple(names)


def _address(config: DirectConfig, endpoints: Sequence[str]) -> tuple[str, str]:
    """The address to bind to, or nothing; and why."""
    if config.address and config.address != "auto":
        return config.address, f"--direct-address {config.address}"
    hosts = [urlsplit(endpoint).hostname for endpoint in endpoints]
    if all(host is None or is_loopback(host) for host in hosts):  # ipc:// has no host
        return "127.0.0.1", "brokers on this machine"
    away = [host for host in hosts if host is not None and not is_loopback(host)]
    host = away[0]
    if not config.address:
        return "", (
            f"the broker at {host} is on a network, where tensors would travel in the clear; "
            "--direct-address auto, or an address, allows it"
        )
    why = ""
    for host in sorted(away, key=_is_name):  # a name may take a name server's time
        try:
            return _towards(host), f"the interface that reaches {host}"
        except OSError as error:  # no such name, or no route
            why = why or (
                f"no way from here to the broker at {host} is known ({error}); give this host's "
                "own address (--direct-address ADDRESS)"
            )
    return "", why


def _is_name(host: str) -> bool:
    return not (":" in host or host.replace(".", "").isdigit())


def _towards(host: str) -> str:
    family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing: it asks the routing table
        return str(probe.getsockname()[0])


@functools.cache
def host_id() -> str:
    """This machine in this boot of it; empty where it cannot be known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
