"""``draftmq broker`` and ``draftmq status``."""

from __future__ import annotations

import json
import logging
import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import click

from broker import logs
from broker.core import BrokerConfig
from broker.errors import BrokerError
from broker.keys import Role, generate, read_secret, write_pair

_DEFAULTS = BrokerConfig()
HTTP_ADDRESS = "127.0.0.1:9555"
_FILE = click.Path(path_type=Path)


@click.command()
@click.option("--clients", default="tcp://127.0.0.1:5555", help="Listen here for trainers.")
@click.option("--workers", default="tcp://127.0.0.1:5556", help="Listen here for workers.")
@click.option(
    "--http", default=HTTP_ADDRESS, help="Serve /healthz, /readyz and /status here; 'off' for none."
)
@click.option("--key", type=_FILE, help="The broker's secret key: peers need keys of their own.")
@click.option(
    "--allow",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Public keys that may connect: a file of lines or a directory; may be repeated.",
)
@click.option(
    "--insecure", is_flag=True, help="Allow addresses that other machines reach, to anyone."
)
@click.option(
    "--window", default=_DEFAULTS.window, help="Requests that one client may have here at once."
)
@click.option(
    "--heartbeat-s", default=_DEFAULTS.heartbeat_s, help="Seconds between a peer's heartbeats."
)
@click.option(
    "--liveness-s", default=_DEFAULTS.liveness_s, help="Silence after which a peer is lost."
)
@logs.options
def broker(
    clients: str,
    workers: str,
    http: str,
    key: Path | None,
    allow: tuple[Path, ...],
    insecure: bool,
    window: int,
    heartbeat_s: float,
    liveness_s: float,
) -> None:
    """Run the broker in the foreground until SIGTERM or SIGINT.

    Clients and workers may come before it, go, and come again. It exits 0 when it was asked to
    stop and 1 when it could not listen. SIGHUP has it read the allow-list again at once; it does so
    by itself when a file changes.
    """
    from broker.access import raise_descriptor_limit
    from broker.notify import notify
    from broker.service import Broker

    try:
        config = BrokerConfig(window=window, heartbeat_s=heartbeat_s, liveness_s=liveness_s)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    raise_descriptor_limit()
    service = Broker(
        clients,
        workers,
        None if http == "off" else http,
        config,
        insecure=insecure,
        key=key,
        allow=allow,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.stop_soon())
    signal.signal(signal.SIGHUP, lambda *_: service.reread_keys())
    with service:
        fields = {
            "clients": service.client_endpoint,
            "workers": service.worker_endpoint,
            "http": service.http_address,
        }
        logging.getLogger("draftmq.broker").info("listening", extra={"fields": fields})
        notify("READY=1")
        service.wait()
        notify("STOPPING=1")
    if service.failed:
        raise BrokerError("the broker ended on an error of its own; see the log above")


@click.command()
@click.option("--http", default=HTTP_ADDRESS, help="The broker's HTTP address.")
@click.option("--key", type=_FILE, help="An operator's secret key, where the broker wants one.")
@click.option("--json", "as_json", is_flag=True, help="Print what the broker says as JSON.")
def status(http: str, key: Path | None, as_json: bool) -> None:
    """Show what the broker sees: models, workers, trainers, requests."""
    shown = fetch_status(http, key)
    if as_json:
        click.echo(json.dumps(shown, indent=1))
        return
    from rich.console import Console

    console = Console()
    for table in _tables(shown):
        console.print(table)


def fetch_status(http: str, key: Path | None = None) -> dict[str, Any]:
    """The broker's ``/status``, shown to the holder of an operator's secret ``key``.

    Raises :class:`BrokerError` where none answers, or not to this key.
    """
    try:
        request = urllib.request.Request(f"http://{http}/status")
        if key is not None:
            request.add_header("Authorization", f"Bearer {read_secret(key, Role.OPERATOR).text}")
        with urllib.request.urlopen(request, timeout=5) as response:
            shown: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        hint = "; give an operator's key that it allows (--key)" if error.code == 401 else ""
        raise BrokerError(f"the broker at http://{http} answered {error}{hint}") from error
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise BrokerError(
            f"no broker answers at http://{http} ({error}); is it running, and with --http {http}?"
        ) from error
    return shown


@click.command()
@click.option(
    "--role",
    type=click.Choice([role.value for role in Role]),
    required=True,
    help="What its holder may do.",
)
@click.option("--name", help="Shown in allow-lists and logs (default: role and host name).")
@click.option("--output", default=".", type=_FILE, help="Directory for the two files.")
@click.option("--json", "as_json", is_flag=True, help="Print the paths and the public key as JSON.")
def keygen(role: str, name: str | None, output: Path, as_json: bool) -> None:
    """Make a key: NAME.secret stays with its holder, NAME.public goes to the others.

    Give a broker its own --key and --allow the public keys of trainers, workers and operators; give
    each of those its own --key and the --broker-key.
    """
    key = generate(Role(role), name or f"{role}-{socket.gethostname()}")
    secret, public = write_pair(output, key)
    if as_json:
        shown = {"secret_path": str(secret), "public_path": str(public), "public": str(key.public)}
        click.echo(json.dumps(shown))
    else:
        click.echo(f"secret: {secret}\npublic: {public}\n{key.public}")


def _tables(shown: dict[str, Any]) -> list[Any]:
    from rich.table import Table

    counts = ", ".join(f"{count} {state}" for state, count in shown["requests"].items())
    summary = Table(title=f"broker {shown['broker']}: {counts}")
    for column in ("model", "workers", "queued", "encodings"):
        summary.add_column(column)
    for name, model in shown["models"].items():
        encodings = ", ".join(model["encodings"])
        summary.add_row(name, str(model["workers"]), str(model["queued"]), encodings)
    return [summary, _rows("workers", shown["workers"]), _rows("trainers", shown["clients"])]


def _rows(title: str, rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title=f"{len(rows)} {title}")
    for column in rows[0] if rows else ():
        table.add_column(column)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
