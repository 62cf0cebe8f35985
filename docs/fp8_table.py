"""What fp8 costs, by target: ``python -m docs.fp8_table TARGET...`` measures and writes the table.

What was measured is kept in ``fp8.json``, so that one target can be measured without the others.
"""

from __future__ import annotations

import json
import lzma
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from worker.supervision.fp8 import from_fp8, to_fp8
from worker.supervision.supervision import compute_supervision
from worker.targets import EMBEDDED, load_target, resolve

PATH = Path(__file__).with_name("encodings.md")
FIGURES = Path(__file__).with_name("fp8.json")
_SAMPLES, _LENGTH = 2, 512


def _one_scale(states: Tensor) -> Tensor:
    """As vLLM's speculators has it: a scale for each token over all its layers [..., L, H]."""
    flat = states.flatten(-2)
    return from_fp8(*to_fp8(flat), torch.float32).view(states.shape)


#: name -> what becomes of states [..., L, H] float32
FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": lambda states: states.bfloat16().float(),
    "fp8, a scale for each token and layer": lambda s: from_fp8(*to_fp8(s), torch.float32),
    "fp8, a scale for each token": _one_scale,
}


def measure(name: str) -> dict[str, Any]:
    """The error of each format on 1,024 tokens of English, by a target in float32."""
    target = load_target(name, dtype="float32")
    with lzma.open(EMBEDDED / "corpus.txt.xz", "rt", encoding="utf-8") as corpus:
        text = corpus.read(40_000)
    ids = AutoTokenizer.from_pretrained(resolve(name))(text)["input_ids"]
    rows = torch.tensor(ids[: _SAMPLES * _LENGTH]).view(_SAMPLES, _LENGTH)
    ones = torch.ones_like(rows)
    wish = f"layers={','.join(map(str, target.aux_layer_ids))};last"
    made = compute_supervision(target, rows, ones, ones, encoding=wish)
    every = torch.cat((made["states"], made["last"].unsqueeze(-2)), dim=-2)  # [B, T, 4, H]
    head: Any = target.get_output_embeddings()
    exact = torch.log_softmax(head(made["last"]).float(), -1)
    return {
        "largest": float(every.abs().max()),
        "median": float(every.abs().median()),
        "formats": {
            each: _errors(every, change(every), head, exact) for each, change in FORMATS.items()
        },
    }


def _errors(every: Tensor, changed: Tensor, head: Any, exact: Tensor) -> dict[str, float]:
    by_layer = [states.transpose(0, 2).flatten(1) for states in (changed - every, every)]
    lost = by_layer[0].norm(dim=1) / by_layer[1].norm(dim=1)  # [L + 1]
    got = torch.log_softmax(head(changed[:, :, -1]).float(), -1)
    divergence = (exact.exp() * (exact - got)).sum(-1).flatten()
    return {
        "layers": float(lost[:-1].max()),
        "kl_mean": float(divergence.mean()),
        "kl_p99": float(divergence.quantile(0.99)),
        "argmax": float((exact.argmax(-1) == got.argmax(-1)).float().mean()),
        "overlap": float(torch.minimum(exact.exp(), got.exp()).sum(-1).mean()),
    }


def table(figures: dict[str, Any]) -> str:
    """The table of ``encodings.md``."""
    lines = [
        "| target (largest and median value of its states) | format | error of a layer | "
        "KL of `last`, mean | p99 | same argmax | overlap |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, of_it in figures.items():
        shown = f"{name} ({of_it['largest']:,.0f}, {of_it['median']:.2g})"
        for each, errors in of_it["formats"].items():
            lines.append(
                f"| {shown} | {each} | {errors['layers']:.4f} | {errors['kl_mean']:.1e} | "
                f"{errors['kl_p99']:.1e} | {errors['argmax']:.1%} | {errors['overlap']:.3f} |"
            )
            shown = ""
    return "\n".join(lines) + "\n"


def render(document: str) -> str:
    """The document with its table made anew."""
    made = table(json.loads(FIGURES.read_text(encoding="utf-8")))
    begin, end = "<!-- fp8: begin -->\n", "<!-- fp8: end -->"
    return re.sub(
        f"{begin}.*?{end}", lambda _: f"{begin}\n{made}\n{end}", document, flags=re.DOTALL
    )


if __name__ == "__main__":
    kept = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    for argument in sys.argv[1:]:
        label = "embedded" if argument == "embedded" else Path(argument).name
        kept[label] = measure(argument)
    FIGURES.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    PATH.write_text(render(PATH.read_text(encoding="utf-8")), encoding="utf-8")
