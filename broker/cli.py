"""``draftmq broker`` and ``draftmq status``."""

from __future__ import annotations

import json
import logging
import signal
import urllib.error
import urllib.request
from typing import Any

import click

from broker import logs
from broker.core import BrokerConfig
from broker.errors import BrokerError

_DEFAULTS = BrokerConfig()
HTTP_ADDRESS = "127.0.0.1:9555"


@click.command()
@click.option("--clients", default="tcp://127.0.0.1:5555", help="Listen here for trainers.")
@click.option("--workers", default="tcp://127.0.0.1:5556", help="Listen here for workers.")
@click.option(
    "--http", default=HTTP_ADDRESS, help="Serve /healthz, /readyz and /status here; 'off' for none."
)
@click.option(
    "--insecure", is_flag=True, help="Allow addresses that other machines reach, unencrypted."
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
    insecure: bool,
    window: int,
    heartbeat_s: float,
    liveness_s: float,
) -> None:
    """Run the broker in the foreground until SIGTERM or SIGINT.

    Clients and workers may come before it, go, and come again. It exits 0 when it was asked to
    stop and 1 when it could not listen.
    """
    from broker.notify import notify
    from broker.service import Broker

    try:
        config = BrokerConfig(window=window, heartbeat_s=heartbeat_s, liveness_s=liveness_s)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    service = Broker(clients, workers, None if http == "off" else http, config, insecure=insecure)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.stop_soon())
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
@click.option("--json", "as_json", is_flag=True, help="Print what the broker says as JSON.")
def status(http: str, as_json: bool) -> None:
    """Show what the broker sees: models, workers, trainers, requests."""
    shown = fetch_status(http)
    if as_json:
        click.echo(json.dumps(shown, indent=1))
        return
    from rich.console import Console

    console = Console()
    for table in _tables(shown):
        console.print(table)


def fetch_status(http: str) -> dict[str, Any]:
    """The broker's ``/status``. Raises :class:`BrokerError` where none answers."""
    try:
        with urllib.request.urlopen(f"http://{http}/status", timeout=5) as response:
            shown: dict[str, Any] = json.load(response)
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise BrokerError(
            f"no broker answers at http://{http} ({error}); is it running, and with --http {http}?"
        ) from error
    return shown


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
