"""The command line's options for direct transfers, the same for workers and trainers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from worker.direct.channel import ChannelConfig
from worker.direct.config import MODES, DirectConfig


class _Ports(click.ParamType[tuple[int, int]]):
    name = "FIRST-LAST"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        first, _, last = str(value).partition("-")
        if not (first.isdigit() and (last or first).isdigit()):
            self.fail(f"{value!r} is no range of ports like 29500-29509", param, ctx)
        return int(first), int(last or first)


_OPTIONS = (
    click.option(
        "--direct",
        type=click.Choice(MODES),
        default="auto",
        show_default=True,
        help="Large tensors past the broker: the best of what both ends can do (on one host "
        "CUDA IPC or shared memory), one way only, or none.",
    ),
    click.option(
        "--direct-address",
        default="",
        metavar="IP|auto",
        help="Interface for direct transfers, in the clear; needed where the broker is remote.",
    ),
    click.option(
        "--direct-limit-s",
        default=ChannelConfig().limit_s,
        show_default=True,
        help="A direct transfer that stands still for so long is asked for again by wire.",
    ),
)

_WORKER_OPTIONS = (
    click.option(
        "--direct-advertise",
        default="",
        metavar="HOST[:PORT]",
        help="Where trainers reach the rendezvous, if not at the address itself.",
    ),
    click.option(
        "--direct-ports",
        type=_Ports(),
        default=(0, 0),
        metavar="FIRST-LAST",
        help="Ports for the rendezvous store (default: any).",
    ),
)


def options(*, worker: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds the options; the command gets them as one ``direct: DirectConfig``."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def wrapped(
            *args: Any,
            direct: str,
            direct_address: str,
            direct_limit_s: float,
            direct_advertise: str = "",
            direct_ports: tuple[int, int] = (0, 0),
            **others: Any,
        ) -> Any:
            try:
                config = DirectConfig(
                    mode=direct,
                    address=direct_address,
                    advertise=direct_advertise,
                    ports=direct_ports,
                    channel=ChannelConfig(limit_s=direct_limit_s),
                )
            except ValueError as error:
                raise click.UsageError(str(error)) from None
            return command(*args, direct=config, **others)

        for option in reversed((*_OPTIONS, *(_WORKER_OPTIONS if worker else ()))):
            wrapped = option(wrapped)
        return wrapped

    return decorate
