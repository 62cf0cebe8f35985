"""Hosts of one machine: network namespaces around a router, and what can go wrong between them.

A lab's namespaces have names of their own, so labs do not meet though their addresses are the same.
They are named for the process that made them: what a process that was killed left behind goes when
the next lab begins.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

_ROOT = Path(__file__).parents[2]
_PREFIX = "draftmq"
_ROUTER = "router"
_NAMESPACES, _FILES = Path("/run/netns"), Path("/etc/netns")
_CLONE_NEWNET = 0x40000000
#: The lookup of routes that sends a host's packets through ``wire.py``.
_TABLE = 100
_TUN = "wire"
_Result = TypeVar("_Result")


@functools.cache
def why_not() -> str:
    """Why there can be no lab here; nothing where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no ip (iproute2)"
    name = f"{_PREFIX}-{os.getpid()}-try"
    tried = _ip("netns", "add", name, check=False)
    if tried.returncode:
        return f"no network namespace can be made: {tried.stderr.strip()}"
    try:
        pair = ["link", "add", "one", "type", "veth", "peer", "name", "two"]
        tried = _ip("-n", name, *pair, check=False)
        if tried.returncode:
            return f"no veth pair can be made: {tried.stderr.strip()}"
    finally:
        _ip("netns", "del", name)
    return ""


class Lab:
    """Hosts with one interface each, behind one router; leaving the block removes everything.

    A host has ``10.81.N.2`` and ``fd81:N::2``, knows all others by name (``/etc/hosts``), and asks
    the router for any other name.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = {name: number for number, name in enumerate(hosts, 1)}
        self._token = f"{_PREFIX}-{os.getpid()}-{secrets.token_hex(3)}"
        self._last = dict.fromkeys(hosts, 2)
        self._families = (4, 6)
        self._rules: list[tuple[str, ...]] = []
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Lab:
        _remove_leftovers()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process of the lab, and remove its namespaces."""
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        _remove(self._token)

    # -- addresses and names ----------------------------------------------------------------------

    def address(self, host: str, family: int = 4) -> str:
        number, last = self.hosts[host], self._last[host]
        return f"10.81.{number}.{last}" if family == 4 else f"fd81:{number}::{last}"

    def move(self, host: str) -> None:
        """The host has new addresses, the old are gone, and its name leads to the new."""
        self._take_addresses(host)
        self._last[host] += 1
        self._give_addresses(host)
        self._write_names()

    def use(self, *families: int) -> None:
        """Hosts have addresses of these families only, 4 or 6 or both, and so have their names."""
        for host in self.hosts:
            self._take_addresses(host)
        self._families = families
        for host in self.hosts:
            self._give_addresses(host)
        self._write_names()

    # -- faults -----------------------------------------------------------------------------------

    def part(self, one: str, other: str) -> None:
        """Nothing passes between the two, in silence."""
        self.one_way(one, other)
        self.one_way(other, one)

    def one_way(self, sender: str, receiver: str) -> None:
        """Nothing passes from the one to the other; what comes back does."""
        self._rule("from", sender, "to", receiver)

    def unplug(self, host: str) -> None:
        """Nothing passes to or from the host, as if it had lost its power."""
        self._rule("from", host)
        self._rule("to", host)

    def heal(self) -> None:
        """All hosts reach one another again."""
        for rule in self._rules:
            _ip("-n", self._namespace(_ROUTER), *rule[:2], "del", *rule[2:])
        self._rules.clear()

    def disturb(self, host: str, *, delay_s: float, loss: float) -> Callable[[], None]:
        """Packets to and from the host come so late, and a share of them never; what ends that."""
        router = ("-n", self._namespace(_ROUTER))
        _ip(*router, "tuntap", "add", _TUN, "mode", "tun")
        _ip(*router, "link", "set", _TUN, "up")
        _ip(*router, "route", "add", "default", "dev", _TUN, "table", str(_TABLE))
        others = [other for other in self.hosts if other != host]
        rules = [("iif", host), *(("to", self._net(host, 4), "iif", other) for other in others)]
        for rule in rules:
            _ip(*router, "rule", "add", *rule, "lookup", str(_TABLE))
        wire = self.start(_ROUTER, "tests.hosts.wire", _TUN, delay_s, loss)

        def undisturbed() -> None:
            for rule in rules:
                _ip(*router, "rule", "del", *rule, "lookup", str(_TABLE))
            wire.kill()
            wire.wait()
            _ip(*router, "link", "del", _TUN)

        return undisturbed

    # -- processes --------------------------------------------------------------------------------

    def start(
        self, host: str, module: str, *arguments: object, log: Path | None = None, **options: Any
    ) -> subprocess.Popen[bytes]:
        """``python -m MODULE ARGUMENTS`` on a host; it ends with the lab at the latest."""
        command = ["ip", "netns", "exec", self._namespace(host), sys.executable, "-m", module]
        sink: Any = log.open("ab") if log is not None else subprocess.DEVNULL
        others = {k: v for k, v in os.environ.items() if not k.startswith("DRAFTMQ_")}
        child = subprocess.Popen(
            [*command, *map(str, arguments)],
            **({"stdin": subprocess.DEVNULL, "stdout": sink} | options),
            stderr=sink,
            cwd=_ROOT,
            env=others | {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        if log is not None:
            sink.close()
        self._children.append(child)
        return child

    def on(self, host: str, call: Callable[[], _Result]) -> _Result:
        """What ``call`` returns in a thread on the host; threads that it starts are there, too.

        Names are not the host's in it, since these belong to processes. Raises what it raises.
        """
        namespace = _NAMESPACES / self._namespace(host)
        results: list[_Result] = []
        errors: list[BaseException] = []

        def there() -> None:
            try:
                with namespace.open() as file:
                    if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                results.append(call())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=there)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    # -- inside -----------------------------------------------------------------------------------

    def _namespace(self, host: str) -> str:
        return f"{self._token}-{host}"

    def _net(self, host: str, family: int) -> str:
        number = self.hosts[host]
        return f"10.81.{number}.0/24" if family == 4 else f"fd81:{number}::/64"

    def _build(self) -> None:
        router = self._namespace(_ROUTER)
        _ip("netns", "add", router)
        _ip("-n", router, "link", "set", "lo", "up")
        for host, number in self.hosts.items():
            name = self._namespace(host)
            _ip("netns", "add", name)
            ends = ["name", host, "type", "veth", "peer", "name", "eth0", "netns", name]
            _ip("-n", router, "link", "add", *ends)
            _ip("-n", router, "addr", "add", f"10.81.{number}.1/24", "dev", host)
            _ip("-n", router, "addr", "add", f"fd81:{number}::1/64", "dev", host, "nodad")
            _ip("-n", router, "link", "set", host, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")
            self._give_addresses(host)
            files = _FILES / name
            files.mkdir(parents=True)
            (files / "resolv.conf").write_text(f"nameserver 10.81.{number}.1\n")
            (files / "nsswitch.conf").write_text("hosts: files dns\n")
        self._write_names()
        both = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding")
        script = "; ".join(f"echo 1 > /proc/sys/{path}" for path in both)
        subprocess.run(["ip", "netns", "exec", router, "sh", "-c", script], check=True)

    def _give_addresses(self, host: str) -> None:
        name, number = self._namespace(host), self.hosts[host]
        for family in self._families:
            length, gateway = (
                (24, f"10.81.{number}.1") if family == 4 else (64, f"fd81:{number}::1")
            )
            ours = f"{self.address(host, family)}/{length}"
            quick = ["nodad"] if family == 6 else []
            _ip("-n", name, "addr", "add", ours, "dev", "eth0", *quick)
            _ip("-n", name, f"-{family}", "route", "add", "default", "via", gateway)

    def _take_addresses(self, host: str) -> None:
        name = self._namespace(host)
        _ip("-n", name, "addr", "flush", "dev", "eth0", "scope", "global")
        _ip("-n", name, "-6", "route", "flush", "default", check=False)

    def _write_names(self) -> None:
        pairs = itertools.product(self.hosts, self._families)
        known = "".join(f"{self.address(host, family)} {host}\n" for host, family in pairs)
        for host in self.hosts:  # in place: processes that run have this very file
            (_FILES / self._namespace(host) / "hosts").write_text(f"127.0.0.1 localhost\n{known}")

    def _rule(self, *ends: str) -> None:
        for family in (4, 6):
            told = [self._net(end, family) if end in self.hosts else end for end in ends]
            rule = (f"-{family}", "rule", *told, "blackhole")
            self._rules.append(rule)
            _ip("-n", self._namespace(_ROUTER), *rule[:2], "add", *rule[2:])


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done


def _remove(token: str) -> None:
    """Remove all namespaces that begin so, with the processes in them."""
    for path in sorted(_NAMESPACES.glob(f"{token}*")) if _NAMESPACES.is_dir() else ():
        for pid in _ip("netns", "pids", path.name, check=False).stdout.split():
            if int(pid) != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        _ip("netns", "del", path.name, check=False)
    for path in _FILES.glob(f"{token}*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove_leftovers() -> None:
    """Remove the labs of processes that are gone."""
    for path in (*_NAMESPACES.glob(f"{_PREFIX}-*"), *_FILES.glob(f"{_PREFIX}-*")):
        token, owner = "-".join(path.name.split("-")[:3]), path.name.split("-")[1]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _remove(token)
