"""Writes the generated tables of ``PROTOCOL.md``: ``python -m broker.protocol.document``."""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path

from broker.protocol import messages
from broker.protocol.schema import describe, field_names
from broker.protocol.wire import KINDS

PATH = Path(__file__).with_name("PROTOCOL.md")


def render(text: str) -> str:
    """The document with its tables made anew."""
    dtypes = "".join(f"| {name} | {size} |\n" for name, size in messages.DTYPE_BYTES.items())
    records = (
        messages.RequestId,
        messages.TensorSpec,
        messages.ModelDescription,
        messages.DirectOffer,
        messages.Invitation,
        messages.Transfer,
    )
    parts = [_section(cls, f"{cls.__name__} (kind {kind})") for kind, cls in sorted(KINDS.items())]
    parts += [_section(cls, f"{cls.__name__} (within messages)") for cls in records]
    codes = "".join(f"| `{code}` | {why} |\n" for code, why in messages.FAILURE_CODES.items())
    parts.append(f"### Failure codes\n\n| code | said by, and why |\n|---|---|\n{codes}")
    text = re.sub(
        r"(\| dtype \| bytes \|\n\|---\|---\|\n).*?(?=\n## )",
        lambda found: found[1] + dtypes,
        text,
        flags=re.S,
    )
    return re.sub(
        r"(## Messages\n\n).*?(?=## Conversation)",
        lambda found: found[1] + "\n".join(parts) + "\n",
        text,
        flags=re.S,
    )


def _section(cls: type, title: str) -> str:
    hints = typing.get_type_hints(cls, include_extras=True)
    rows = "".join(f"| `{name}` | {describe(hints[name])} |\n" for name in field_names(cls))
    table = f"\n| field | type |\n|---|---|\n{rows}" if rows else ""
    return f"### {title}\n\n{inspect.getdoc(cls)}\n{table}"


if __name__ == "__main__":
    PATH.write_text(render(PATH.read_text(encoding="utf-8")), encoding="utf-8")
