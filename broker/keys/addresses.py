"""Addresses: one parser for all commands and classes, before a socket or a model is made."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from broker.errors import BrokerError

_LOCAL_KINDS = ("ipc", "inproc")
_HOST_AND_PORT = re.compile(r"(?P<host>\[[^\[\]]+\]|[^:\[\]/\s]+):(?P<port>[0-9]{1,9})")


class AddressError(BrokerError, ValueError):
    """What was given is no address of the kind that is wanted; the text says what one is."""


@dataclass(frozen=True)
class Address:
    """``kind://host:port``, or of ``ipc`` and ``inproc`` a path as ``host``."""

    kind: str
    host: str
    port: int = 0

    @property
    def local(self) -> bool:
        """Whether no other machine reaches it."""
        return self.kind in _LOCAL_KINDS or is_loopback(self.host)

    @property
    def ipv6(self) -> bool:
        """Whether it names an IPv6 address."""
        return ":" in self.host and self.kind not in _LOCAL_KINDS

    @property
    def named(self) -> bool:
        """Whether its host is a name, which must be looked up."""
        return self.kind == "tcp" and not _is_ip(self.host.partition("%")[0])


def connecting(text: str) -> Address:
    """Where a broker listens, as peers say it. Raises :class:`AddressError`."""
    address = _zeromq(text, "tcp://HOST:5555")
    if address.kind == "tcp" and (address.port == 0 or address.host == "*"):
        raise AddressError(f"{text!r} is no place to connect to; name the broker's host and port")
    return address


def listening(text: str) -> Address:
    """Where a broker shall listen; port 0 or ``*`` takes a free one. Raises AddressError."""
    return _zeromq(text, "tcp://127.0.0.1:5555")


def http(text: str) -> Address:
    """``HOST:PORT`` of an HTTP server; port 0 takes a free one. Raises :class:`AddressError`."""
    if "://" in text:
        bare = text.partition("://")[2].rstrip("/")
        raise AddressError(f"{text!r} is a URL; HTTP is served at HOST:PORT, like {bare or text}")
    return _host_and_port(text, "http", "127.0.0.1:9555")


def is_local(address: str) -> bool:
    """Whether no other machine reaches this ZeroMQ endpoint. Raises :class:`AddressError`."""
    return listening(address).local


def is_loopback(host: str) -> bool:
    """Whether a host is this machine for itself: ``localhost``, 127.0.0.0/8, ::1."""
    if _is_ip(host):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _zeromq(text: str, example: str) -> Address:
    kind, separator, rest = text.partition("://")
    if not separator:
        hint = f"tcp://{text}" if _HOST_AND_PORT.fullmatch(text) else example
        raise AddressError(f"{text!r} has no tcp:// or ipc:// before it; write {hint}")
    if kind in _LOCAL_KINDS:
        if not rest:
            raise AddressError(f"{text!r} names no path; write ipc:///run/draftmq/clients")
        return Address(kind, rest)
    if kind != "tcp":
        raise AddressError(
            f"{text!r} is a {kind} address; brokers speak ZeroMQ: write {example}, or ipc://PATH "
            "on one machine"
        )
    return _host_and_port(rest, "tcp", example, text)


def _host_and_port(text: str, kind: str, example: str, whole: str = "") -> Address:
    whole = whole or text
    wildcard = text.removesuffix(":*") + ":0" if text.endswith(":*") else text
    found = _HOST_AND_PORT.fullmatch(wildcard)
    if found is None:
        if text.count(":") > 1 and not text.startswith("["):
            raise AddressError(f"{whole!r}: an IPv6 address stands in brackets, like [::1]:5555")
        missing = "has no port" if ":" not in text else "is no HOST:PORT"
        raise AddressError(f"{whole!r} {missing}; write {example}")
    host, port = found["host"].strip("[]"), int(found["port"])
    if port > 65535:
        raise AddressError(f"{whole!r} has the port {port}; ports end at 65535")
    if found["host"].startswith("["):
        try:
            ipaddress.IPv6Address(host.partition("%")[0])
        except ValueError:
            raise AddressError(f"{whole!r}: {host!r} is no IPv6 address") from None
    return Address(kind, host, port)
