"""A broker's ``/status`` as a terminal shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Values = dict[str, Any]
#: Rows shown of a long table; the rest is counted.
_ROWS = 20
_STATES = {"busy": "green", "idle": "cyan", "draining": "yellow"}
#: Counters of what should not happen; shown once it has.
_TROUBLE = (
    *("failures", "expired", "requeues", "hedges", "resends", "answered_again"),
    *("late_answers", "unasked_answers", "bad_messages"),
)


def screen(shown: Values, rates: Values | None = None, *, address: str = "") -> RenderableType:
    """All that is to be seen of one broker; with ``rates``, also how fast it goes."""
    parts: list[RenderableType] = [_title(shown, address), _numbers(shown, rates)]
    parts += [Text(f"! {_plain(warning)}", "bold yellow") for warning in shown["warnings"]]
    parts += [_models(shown), _workers(shown, rates), _clients(shown, rates), _direct(shown)]
    return Group(*parts)


def _title(shown: Values, address: str) -> Text:
    title = Text.assemble(("draftmq broker ", "bold"), _plain(shown["broker"]))
    if address:
        title.append(f" at {address}")
    return title.append(f", up {duration(shown['uptime_s'])}")


def _numbers(shown: Values, rates: Values | None) -> Text:
    requests = shown["requests"]
    facts = [f"{requests['queued']} queued", f"{requests['running']} running"]
    facts += [
        f"{requests[name]} {name.replace('_', ' ')}"
        for name in ("without_worker", "without_mapping")
        if requests[name]
    ]
    facts += [
        f"{count} {place.replace('_', ' ')}"
        for place, count in shown.get("places", {}).items()
        if count and place not in ("queued", "running", "pool", "mapping")
    ]
    facts.append(f"{shown['held_answers']} answers held ({size(shown['held_answer_bytes'])})")
    lines = [", ".join(facts)]
    if rates is not None:
        lines.append(
            f"{rates['requests_per_s']:.1f} requests/s, {rates['replies_per_s']:.1f} replies/s, "
            f"{rates['tokens_per_s']:,.0f} tokens/s, in {size(rates['received_bytes_per_s'])}/s, "
            f"out {size(rates['sent_bytes_per_s'])}/s"
        )
        lines.append(
            f"a request waits {short(rates['queue_wait_s'])}, is at a worker for "
            f"{short(rates['service_s'])}, of which it computes {short(rates['compute_s'])}"
        )
    else:
        counters = shown["counters"]
        lines.append(
            f"{counters['requests']} requests and {counters['replies']} replies so far, "
            f"in {size(_bytes(shown, 'received'))}, out {size(_bytes(shown, 'sent'))}"
        )
    trouble = [
        f"{shown['counters'][name]} {name.replace('_', ' ')}"
        for name in _TROUBLE
        if shown["counters"].get(name)
    ]
    if trouble:
        lines.append("so far " + ", ".join(trouble))
    return Text("\n".join(lines))


def _bytes(shown: Values, direction: str) -> int:
    return sum(counts[direction] for counts in shown["bytes"].values())


def _models(shown: Values) -> RenderableType:
    rows = [
        [name, model["workers"], model["queued"], model["running"], ", ".join(model["encodings"])]
        for name, model in shown["models"].items()
    ]
    return _table("model", ("model", "workers", "queued", "running", "encodings"), rows)


def _workers(shown: Values, rates: Values | None) -> RenderableType:
    rows = []
    for worker in shown["workers"]:
        speed = worker["tokens_per_s"]
        rows.append(
            [
                worker["worker"],
                worker["model"],
                Text(worker["state"], _STATES.get(worker["state"], "")),
                f"{worker['running']}/{worker['credits']}",
                worker["answered"],
                _rate(rates, "workers", worker["worker"]),
                "-" if speed is None else f"{speed:,.0f}",
                short(worker["silent_s"]),
            ]
        )
    columns = ("worker", "model", "state", "running", "answered", "a second", "tokens/s", "silent")
    return _table("worker", columns, rows)


def _clients(shown: Values, rates: Values | None) -> RenderableType:
    rows = []
    for client in sorted(shown["clients"], key=lambda client: (client["job"], client["rank"])):
        rows.append(
            [
                client["rank"],
                client["job"],
                client["client"],
                "-" if client["step"] is None else client["step"],
                client["requests"],
                client["answered"],
                _rate(rates, "clients", client["client"]),
                short(client["silent_s"]) if client["connected"] else Text("gone", "yellow"),
            ]
        )
    columns = ("rank", "job", "client", "step", "requests", "answered", "a second", "silent")
    return _table("trainer rank", columns, rows)


def _direct(shown: Values) -> RenderableType:
    """What peers chose for direct transfers and why, each answer once with how many gave it."""
    lines = []
    for kind in ("worker", "client"):
        said = Counter(peer["direct"] for peer in shown[f"{kind}s"] if peer["direct"])
        lines += [f"{count} {kind}(s): {_plain(text)}" for text, count in said.most_common(_ROWS)]
    return Text("\ndirect transfers\n" + "\n".join(lines)) if lines else Text("")


def _rate(rates: Values | None, kind: str, name: str) -> str:
    found = None if rates is None else rates[kind].get(name)
    return "-" if found is None else f"{found:.1f}"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> RenderableType:
    if not rows:
        return Text(f"\nno {title}s", "dim")
    table = Table(
        title=f"\n{len(rows)} {title}{'s' if len(rows) > 1 else ''}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for column, value in zip(columns, rows[0], strict=True):
        number = isinstance(value, int) or (isinstance(value, str) and value[:1] in "-0123456789")
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows[:_ROWS]:
        table.add_row(*(cell if isinstance(cell, Text) else Text(_plain(cell)) for cell in row))
    if len(rows) > _ROWS:
        table.caption = f"and {len(rows) - _ROWS} more"
        table.caption_justify = "left"
    return table


def _plain(value: Any) -> str:
    """What peers call themselves may not steer a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def size(count: float) -> str:
    """Bytes in the unit that reads best."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def short(seconds: float | None) -> str:
    """A time from microseconds to hours in about four characters."""
    if seconds is None:
        return "-"
    if seconds < 0.001:
        return f"{1e6 * seconds:.0f} µs"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 100 else duration(seconds)


def duration(seconds: float) -> str:
    """``3 d 4 h``, ``2 h 5 min``, ``1 min 9 s`` or ``42 s``."""
    whole = int(seconds)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    parts = []
    for unit, length in units:
        count, whole = divmod(whole, length)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"
