"""``draftmq broker``."""

from __future__ import annotations

import logging
import signal

import click

from broker import logs
from broker.core import BrokerConfig
from broker.errors import BrokerError
from broker.look import HTTP_ADDRESS

_DEFAULTS = BrokerConfig()


@click.command()
@click.option("--clients", default="tcp://127.0.0.1:5555", help="Listen here for trainers.")
@click.option("--workers", default="tcp://127.0.0.1:5556", help="Listen here for workers.")
@click.option(
    "--http",
    default=HTTP_ADDRESS,
    help="Serve a live page, /metrics, /status, /healthz, /readyz here; 'off' for none.",
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
@click.option(
    "--hedge-after",
    default=_DEFAULTS.hedge_after,
    help="Run a request twice once it takes so many times as long as expected (0: never).",
)
@click.option(
    "--hedge-share", default=_DEFAULTS.hedge_share, help="Share of the requests that may run twice."
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
    hedge_after: float,
    hedge_share: float,
) -> None:
    """Run the broker in the foreground until SIGTERM or SIGINT.

    Clients and workers may come before it, go, and come again. It exits 0 when it was asked to
    stop and 1 when it could not listen.
    """
    from broker.notify import notify
    from broker.service import Broker

    try:
        config = BrokerConfig(
            window=window,
            heartbeat_s=heartbeat_s,
            liveness_s=liveness_s,
            hedge_after=hedge_after,
            hedge_share=hedge_share,
        )
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
