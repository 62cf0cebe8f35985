"""Writes the tables of sizes in ``operations.md``: ``python -m docs.sizing_table``.

Bytes a token come from the code that makes replies, limits from the configuration. What was
measured is in ``gpu.md`` and ``benchmarks.md``; a test holds the figures below to those pages.
"""

from __future__ import annotations

import re
from pathlib import Path

from broker.core import BrokerConfig
from broker.protocol.limits import GIB, KIB, MIB
from docs.encodings_table import WISHES_FOR, bytes_per_token

PATH = Path(__file__).with_name("operations.md")
WIDTHS = (2048, 4096, 8192)
#: Tokens a second of one H100 with an 8B target, through broker and worker by CUDA IPC, at 1x2048.
SUPPLY = 25_560
#: Milliseconds of a training step of 2,048 tokens of an 8B target's draft, 7 depths, on one H100.
STEP_MS, STEP_TOKENS = 97, 2048
#: GiB/s of replies of 64 MiB through one broker by TCP, on two cores; the lower of two runs.
WIRE = 1.31
#: Small requests a second that one broker passes on, with 1,000 clients, on two cores.
REQUESTS = 1917
#: The broker's memory without peers, and for a connection (docs/memory.md).
BASE_BYTES, CONNECTION_BYTES = 64 * MIB, 128 * KIB


def workers_of(gpus: int) -> int:
    """How many of the GPUs serve, so that the slower of both sides is as fast as can be."""
    return max(range(1, gpus), key=lambda workers: tokens_per_second(workers, gpus - workers))


def tokens_per_second(workers: int, trainers: int) -> float:
    """What a pool trains: the slower of what it supplies and what its trainers take."""
    return min(workers * SUPPLY, trainers * STEP_TOKENS / STEP_MS * 1e3)


def broker_bytes(connections: int) -> int:
    """The bound of docs/memory.md for the default limits."""
    limits = BrokerConfig()
    stores = limits.max_total_bytes + limits.held_answer_bytes + limits.max_total_request_bytes
    return BASE_BYTES + CONNECTION_BYTES * connections + stores + limits.held_mapping_bytes


def _bytes() -> str:
    head = " | ".join(f"H={width:,}" for width in WIDTHS)
    lines = [f"| wish | {head} |", "|---|" + "---|" * len(WIDTHS)]
    for wish in WISHES_FOR:
        cells = " | ".join(f"{bytes_per_token(wish, width):,.0f}" for width in WIDTHS)
        lines.append(f"| `{wish}` | {cells} |")
    return "\n".join(lines) + "\n"


def _examples() -> str:
    columns = {gpus: _example(gpus) for gpus in (8, 64)}
    lines = ["| | 8 GPUs | 64 GPUs |", "|---|---|---|"]
    lines += [f"| {row} | {columns[8][row]} | {columns[64][row]} |" for row in columns[8]]
    return "\n".join(lines) + "\n"


def _example(gpus: int) -> dict[str, str]:
    workers = workers_of(gpus)
    trainers = gpus - workers
    rate = tokens_per_second(workers, trainers)
    hidden, fp8 = (
        rate * bytes_per_token(wish) / GIB for wish in ("hidden", "layers=1,15,28;last;states=fp8")
    )
    return {
        "workers + trainer ranks": f"{workers} + {trainers}",
        "tokens/s that workers can supply": f"{workers * SUPPLY:,}",
        "tokens/s that ranks can train": f"{trainers * STEP_TOKENS / STEP_MS * 1e3:,.0f}",
        "tokens/s of the whole": f"{rate:,.0f}",
        "hours for a billion tokens": f"{1e9 / rate / 3600:.1f}",
        "requests/s, of 2,048 tokens": f"{rate / STEP_TOKENS:,.0f}",
        "of what one broker can pass on": f"{rate / STEP_TOKENS / REQUESTS:.0%}",
        "GiB/s of supervision, `hidden`": f"{hidden:.1f}",
        "GiB/s of supervision, with `states=fp8`": f"{fp8:.1f}",
        "brokers, if all went by TCP (`hidden` / fp8)": f"{_up(hidden)} / {_up(fp8)}",
        "a broker's memory at most": f"{broker_bytes(gpus) / GIB:.1f} GiB",
    }


def _up(rate: float) -> int:
    return int(-(-rate // WIRE))


def render(document: str) -> str:
    """The document with its tables made anew."""
    for name, made in (("bytes", _bytes()), ("examples", _examples())):
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        wanted = f"{begin}\n{made}\n{end}"
        document = re.sub(f"{begin}.*?{end}", lambda _, w=wanted: w, document, flags=re.DOTALL)
    return document


if __name__ == "__main__":
    PATH.write_text(render(PATH.read_text(encoding="utf-8")), encoding="utf-8")
