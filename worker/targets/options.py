"""What command lines say of targets."""

from __future__ import annotations

import click


class Layers(click.ParamType[tuple[int, ...]]):
    """Numbers of layers, with commas between them."""

    name = "I,J,K"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not layer numbers like 1,5,8", param, ctx)
