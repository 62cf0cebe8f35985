"""``draftmq status`` and ``draftmq top``."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from broker.errors import BrokerError
from broker.keys.operators import read_token
from broker.options import FiniteRange
from broker.watch.rates import rates

HTTP_ADDRESS = "127.0.0.1:9555"
Values = dict[str, Any]
_TOKEN = click.option(
    "--http-token",
    type=click.Path(path_type=Path),
    help="The file of the operators' token, where the broker wants one.",
)


def fetch(http: str, path: str, token: Path | None = None) -> Values:
    """The JSON that a broker's HTTP port serves, to the holder of the file ``token``.

    Raises :class:`BrokerError` where none answers, or not to this token.
    """
    directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(f"http://{http}{path}")
        if token is not None:
            request.add_header("Authorization", f"Bearer {read_token(token)}")
        with directly.open(request, timeout=5) as response:
            shown: Values = json.load(response)
    except urllib.error.HTTPError as error:
        hint = "; give the operators' token (--http-token FILE)" if error.code == 401 else ""
        raise BrokerError(f"the broker at http://{http} answered {error}{hint}") from error
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise BrokerError(
            f"no broker answers at http://{http} ({error}); is it running, and with --http {http}?"
        ) from error
    if not isinstance(shown, dict) or "broker" not in shown:
        raise BrokerError(f"what answers at http://{http} is no broker; name a broker's --http")
    return shown


_STATUS_EXAMPLE = """\b
Example:
  draftmq status --http 127.0.0.1:9555 --json"""


@click.command(epilog=_STATUS_EXAMPLE)
@click.option("--http", default=HTTP_ADDRESS, help="The broker's HTTP address.")
@_TOKEN
@click.option("--json", "as_json", is_flag=True, help="Print what the broker says as JSON.")
def status(http: str, http_token: Path | None, as_json: bool) -> None:
    """Show what the broker sees: models, workers, trainers, requests."""
    shown = fetch(http, "/status", http_token)
    if as_json:
        click.echo(json.dumps(shown, indent=1))
        return
    from rich.console import Console

    from broker.watch.screen import screen

    Console().print(screen(shown, address=http))


_TOP_EXAMPLE = """\b
Example:
  draftmq top --http HOST1:9555 --http HOST2:9555"""


@click.command(epilog=_TOP_EXAMPLE)
@click.option(
    "--http",
    multiple=True,
    default=[HTTP_ADDRESS],
    help="A broker's HTTP address; may be repeated.",
)
@click.option(
    "--interval", type=FiniteRange(min=0.1), default=1.0, help="Seconds between two looks."
)
@_TOKEN
@click.option("--once", is_flag=True, help="Look for one interval, print it, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line and interval.")
def top(
    http: tuple[str, ...], interval: float, http_token: Path | None, once: bool, as_json: bool
) -> None:
    """Watch brokers live: workers, ranks, queue and rates. 'q' or Ctrl-C ends it."""
    brokers = [_Watched(address, http_token) for address in http]
    with contextlib.suppress(KeyboardInterrupt), _keys() as quit_within:
        if as_json or once or not sys.stdout.isatty():
            _print(brokers, interval, quit_within, once, as_json)
        else:
            _live(brokers, interval, quit_within)


class _Watched:
    """One broker, with the look before the last."""

    def __init__(self, http: str, token: Path | None) -> None:
        self.http = http
        self._token = token
        self.status: Values | None = None
        self.rates: Values | None = None
        self.error = ""

    def look(self) -> None:
        before = self.status
        try:
            self.status, self.error = fetch(self.http, "/status", self._token), ""
            self.rates = rates(before, self.status)
        except BrokerError as error:
            self.status, self.rates, self.error = None, None, str(error)

    def plain(self) -> Values:
        return {
            "http": self.http,
            "status": self.status,
            "rates": self.rates,
            "error": self.error or None,
        }


def _print(
    brokers: Sequence[_Watched],
    interval: float,
    quit_within: Callable[[float], bool],
    once: bool,
    as_json: bool,
) -> None:
    from rich.console import Console

    _look(brokers)
    while not quit_within(interval):
        _look(brokers)
        if as_json:
            click.echo(json.dumps({"brokers": [watched.plain() for watched in brokers]}))
        else:
            Console().print(_screen(brokers))
        if once:
            if errors := [watched.error for watched in brokers if watched.error]:
                raise BrokerError("; ".join(errors))
            return


def _live(
    brokers: Sequence[_Watched], interval: float, quit_within: Callable[[float], bool]
) -> None:
    from rich.live import Live

    _look(brokers)
    with Live(_screen(brokers), screen=True, auto_refresh=False) as live:
        while not quit_within(interval):
            _look(brokers)
            live.update(_screen(brokers), refresh=True)


def _look(brokers: Sequence[_Watched]) -> None:
    for watched in brokers:
        watched.look()


def _screen(brokers: Sequence[_Watched]) -> Any:
    from rich.console import Group
    from rich.text import Text

    from broker.watch.screen import screen

    return Group(
        *(
            screen(watched.status, watched.rates, address=watched.http)
            if watched.status is not None
            else Text(watched.error, "bold red")
            for watched in brokers
        )
    )


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Gives ``quit_within(seconds)``: waits, and says whether 'q' was pressed meanwhile."""
    terminal = sys.stdin.isatty()
    descriptor = sys.stdin.fileno() if terminal else -1

    def quit_within(seconds: float) -> bool:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            keys = [descriptor] if terminal else []
            if select.select(keys, [], [], left)[0]:
                pressed = os.read(descriptor, 64)
                if not pressed or b"q" in pressed.lower():
                    return True
        return False

    if not terminal:
        yield quit_within
        return
    import termios
    import tty

    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield quit_within
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
