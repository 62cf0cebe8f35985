"""``draftmq broker``."""

from __future__ import annotations

import json
import logging
import signal
import socket
from pathlib import Path

import click

from broker import logs
from broker.core import BrokerConfig
from broker.errors import BrokerError
from broker.keys import operators
from broker.keys.files import Role, generate, write_pair
from broker.watch.look import HTTP_ADDRESS

_DEFAULTS = BrokerConfig()
_FILE = click.Path(path_type=Path)
#: No key of a peer, but a token for HTTP.
_OPERATOR = "operator"


_BROKER_EXAMPLE = """\b
Example:
  draftmq broker --clients tcp://0.0.0.0:5555 --workers tcp://0.0.0.0:5556 \\
      --key broker.secret --allow allow/"""


@click.command(epilog=_BROKER_EXAMPLE)
@click.option(
    "--clients",
    default="tcp://127.0.0.1:5555",
    help="Listen here for trainers: tcp://HOST:PORT or, on one machine, ipc://PATH.",
)
@click.option(
    "--workers", default="tcp://127.0.0.1:5556", help="Listen here for workers, likewise."
)
@click.option(
    "--http",
    default=HTTP_ADDRESS,
    help="Serve a live page, /metrics, /status, /healthz, /readyz here; 'off' for none.",
)
@operators.option
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
    http_token: str | Path | None,
    key: Path | None,
    allow: tuple[Path, ...],
    insecure: bool,
    window: int,
    heartbeat_s: float,
    liveness_s: float,
    hedge_after: float,
    hedge_share: float,
) -> None:
    """Run the broker in the foreground until SIGTERM or SIGINT.

    Clients and workers may come before it, go, and come again. It exits 0 when it was asked to
    stop and 1 when it could not listen. SIGHUP has it read the allow-list again at once; it does so
    by itself when a file changes.
    """
    from broker.keys.access import raise_descriptor_limit
    from broker.notify import notify
    from broker.service import Broker
    from broker.signals import wait_until

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
    raise_descriptor_limit()
    service = Broker(
        clients,
        workers,
        None if http == "off" else http,
        config,
        insecure=insecure,
        key=key,
        allow=allow,
        http_token=http_token,
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
        wait_until(service.wait)
        notify("STOPPING=1")
    if service.failed:
        raise BrokerError("the broker ended on an error of its own; see the log above")


_KEYGEN_EXAMPLE = """\b
Example:
  draftmq keygen --role worker --name gpu-17 --output keys"""


@click.command(epilog=_KEYGEN_EXAMPLE)
@click.option(
    "--role",
    type=click.Choice([*(role.value for role in Role), _OPERATOR]),
    required=True,
    help="What its holder may do.",
)
@click.option("--name", help="Shown in allow-lists and logs (default: role and host name).")
@click.option("--output", default=".", type=_FILE, help="Directory for the two files.")
@click.option("--json", "as_json", is_flag=True, help="Print the paths and the public key as JSON.")
def keygen(role: str, name: str | None, output: Path, as_json: bool) -> None:
    """Make a key: NAME.secret stays with its holder, NAME.public goes to the others.

    Give a broker its own --key and --allow the public keys of trainers and workers; give each of
    those its own --key and the --broker-key. For an operator it makes NAME.token, which is given to
    whoever has --http-token: those who serve HTTP, and those who look.
    """
    name = name or f"{role}-{socket.gethostname()}"
    if role == _OPERATOR:
        token = operators.write_token(output, name)
        click.echo(json.dumps({"token_path": str(token)}) if as_json else f"token: {token}")
        return
    key = generate(Role(role), name)
    secret, public = write_pair(output, key)
    if as_json:
        shown = {"secret_path": str(secret), "public_path": str(public), "public": str(key.public)}
        click.echo(json.dumps(shown))
    else:
        click.echo(f"secret: {secret}\npublic: {public}\n{key.public}")
