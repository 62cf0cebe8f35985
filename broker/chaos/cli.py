"""``draftmq chaos``."""

from __future__ import annotations

import json
import logging
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from broker import logs
from broker.options import ABOVE_0

if TYPE_CHECKING:
    from broker.chaos.faults import Rule

_CHAOS_EXAMPLE = """\b
Example:
  draftmq chaos --listen tcp://127.0.0.1:6555 --upstream tcp://127.0.0.1:5555 --cut-every 5"""


@click.command(epilog=_CHAOS_EXAMPLE)
@click.option(
    "--listen", multiple=True, required=True, help="Peers connect here: tcp://HOST:PORT; repeat."
)
@click.option(
    "--upstream", multiple=True, required=True, help="And reach this; one for each --listen."
)
@click.option("--seed", type=int, help="What chance comes from (default: the script's, else 0).")
@click.option("--cut-every", type=ABOVE_0, help="Cut one connection every so many seconds.")
@click.option("--cut", type=ABOVE_0, help="Cuts to expect in a second of each connection.")
@click.option("--corrupt", type=ABOVE_0, help="Flipped bits to expect in each MiB.")
@click.option("--truncate", type=ABOVE_0, help="Cuts to expect in each MiB, in mid-stream.")
@click.option("--stall-every", type=ABOVE_0, help="Stall one connection so often (seconds) ...")
@click.option("--stall-for", type=ABOVE_0, default=2.0, help="... for so long.")
@click.option("--delay", type=ABOVE_0, help="Seconds that all bytes are kept, each way.")
@click.option("--jitter", type=ABOVE_0, help="And up to so many seconds more.")
@click.option("--throttle", type=ABOVE_0, help="Bytes a second, each way of each connection.")
@click.option(
    "--script",
    type=click.Path(dir_okay=False, path_type=Path),
    help="TOML or JSON that says which faults strike when; see docs/chaos.md.",
)
@click.option("--control", help="Serve /status, /faults and /cut here: HOST:PORT.")
@click.option("--duration", type=ABOVE_0, help="End by itself after so many seconds.")
@click.option("--insecure", is_flag=True, help="Allow addresses that other machines reach.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print what was injected at the end, as JSON."
)
@logs.options
def chaos(
    listen: tuple[str, ...],
    upstream: tuple[str, ...],
    seed: int | None,
    script: Path | None,
    control: str | None,
    duration: float | None,
    insecure: bool,
    as_json: bool,
    **faults: float | None,
) -> None:
    """Put a proxy that injects faults between your own peers, until SIGTERM, SIGINT or --duration.

    Without any fault it only forwards; faults can be injected at --control.
    """
    from broker.chaos.addresses import parse_endpoint, refuse_open_host
    from broker.chaos.control import Control
    from broker.chaos.proxy import ChaosProxy
    from broker.chaos.script import load_script
    from broker.signals import wait_until

    rules = _rules(**faults)
    if script is not None:
        loaded = load_script(script)
        rules += loaded.rules
        seed = loaded.seed if seed is None else seed
    if control is not None and not insecure:
        refuse_open_host(parse_endpoint(f"tcp://{control}")[0])
    proxy = ChaosProxy(listen, upstream, rules=rules, seed=seed or 0, insecure=insecure)
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    with proxy:
        server = None if control is None else Control(control, proxy)
        if server is not None:
            server.start()
        fields = {
            "listen": ",".join(proxy.endpoints),
            "upstream": ",".join(upstream),
            "control": server and server.address,
            "rules": len(rules),
            "seed": seed or 0,
        }
        logging.getLogger("draftmq.chaos").info("listening", extra={"fields": fields})
        wait_until(ending.wait, duration)
        if server is not None:
            server.stop()
        snapshot = proxy.snapshot()
    if as_json:
        click.echo(json.dumps(snapshot))
        return
    struck = ", ".join(f"{count} {kind}" for kind, count in snapshot["injected"].items() if count)
    click.echo(f"{snapshot['counters']['accepted']} connections; injected: {struck or 'nothing'}")


def _rules(**options: Any) -> list[Rule]:
    """What the options say, as a script would."""
    from broker.chaos.faults import read_rule

    begins, chosen = {"at": 0}, {name: value for name, value in options.items() if value}
    said: list[dict[str, Any]] = []
    if every := chosen.get("cut_every"):
        said.append({"kind": "cut", "every": every, "connections": "one"})
    if rate := chosen.get("cut"):
        said.append({"kind": "cut", "per_s": rate})
    for kind in ("corrupt", "truncate"):
        if rate := chosen.get(kind):
            said.append({"kind": kind, "per_mib": rate})
    if every := chosen.get("stall_every"):
        lasting = {"for": chosen["stall_for"], "connections": "one"}
        said.append({"kind": "stall", "every": every, **lasting})
    if delays := {f"{name}_s": chosen[name] for name in ("delay", "jitter") if name in chosen}:
        said.append({"kind": "delay", **delays, **begins})
    if rate := chosen.get("throttle"):
        said.append({"kind": "throttle", "bytes_per_s": rate, **begins})
    return [read_rule(fields) for fields in said]
