"""Writes the tables in ``encodings.md``: ``python -m docs.encodings_table``."""

from __future__ import annotations

import lzma
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoTokenizer

from broker.protocol.wish import NAMES
from trainer_client.eagle3.supervision import of_topk
from worker.supervision.mapping import VocabMapping
from worker.supervision.supervision import compute_supervision
from worker.supervision.topk import top_probs
from worker.targets import EMBEDDED, load_target
from worker.targets.contract import Needs, TargetOutputs

PATH = Path(__file__).with_name("encodings.md")
H, D, V, T = 4096, 32_000, 128_256, 2048
#: wish -> for what; the names first
WISHES_FOR = {
    "probs": "EAGLE-3, bit for bit",
    "hidden": "EAGLE-3",
    "topk": "EAGLE-3, lossy",
    "layers=1,15,28;last": "EAGLE-3, EAGLE-3.1, P-EAGLE",
    "layers=1,15,28;last;states=fp8": "the same",
    "layers=1,8,15,22,29": "DFlash, hard targets",
    "layers=1,8,15,22,29;states=fp8": "the same",
    "layers=1,8,15,22,29;last": "DSpark, DFlash with KL",
    "layers=1,8,15,22,29;last;states=fp8": "the same",
    "last": "MTP fine-tuning",
    "last=fp8": "the same",
}
WISHES = tuple(WISHES_FOR)
#: kept of the embedded target's distributions, to see what is lost
KEPT = (8, 64, 256)


class _Shapes:
    """A target of that width whose tensors have shapes and no content."""

    def __init__(self, hidden: int) -> None:
        self._hidden = hidden

    name, encodings, vocab_size, layers = "shapes", NAMES, V, ()
    model = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=32))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        loss_mask: torch.Tensor,
        needs: Needs | None = None,
    ) -> TargetOutputs:
        def states(size: int) -> torch.Tensor:
            return torch.empty(*input_ids.shape, size, dtype=torch.bfloat16, device="meta")

        layers = 3 if needs is None else len(needs.layers)
        width = self._hidden
        return TargetOutputs(states(width * layers), states(V), states(width))


def bytes_per_token(encoding: str, hidden: int = H) -> float:
    """Of a reply with T tokens of a target of that width, from the very code that makes replies."""
    ids = torch.empty(1, T, dtype=torch.int64, device="meta")
    mapping: Any = SimpleNamespace(
        vocab_size=V,
        on=lambda device: (
            torch.empty(D, dtype=torch.int64, device=device),
            torch.empty(V, dtype=torch.bool, device=device),
        ),
    )
    target: Any = _Shapes(hidden)
    made = compute_supervision(target, ids, ids, ids, mapping=mapping, encoding=encoding)
    return sum(tensor.nbytes for tensor in made.values()) / T


def lost(kept: int, samples: int = 4, length: int = 128) -> tuple[float, float]:
    """Mean mass outside the ``kept`` largest, and mean total variation distance of what is rebuilt.

    Over slots of the embedded target's own corpus, with the whole vocabulary as the draft's.
    """
    target = load_target("embedded")
    with lzma.open(EMBEDDED / "corpus.txt.xz", "rt", encoding="utf-8") as corpus:
        ids = AutoTokenizer.from_pretrained(EMBEDDED)(corpus.read(20_000))["input_ids"]
    tokens = torch.tensor(ids[: samples * length]).view(samples, length)
    with torch.no_grad():
        logits = target.forward(tokens, torch.ones_like(tokens)).logits
    every = VocabMapping(torch.arange(target.vocab_size), target.vocab_size).selected_token_ids
    top = top_probs(logits, every, kept)
    parts = (top["topk_log_probs"], top["topk_ids"], top["rest_mass"])
    whole = of_topk(*parts, torch.ones_like(tokens, dtype=torch.bool), target.vocab_size)
    slots = torch.arange(tokens.numel())
    exact = torch.softmax(logits.float(), -1).flatten(0, 1)
    distance = (whole.probs(slots) - exact).abs().sum(-1) / 2
    return float(top["rest_mass"].mean()), float(distance.mean())


def _sizes() -> str:
    lines = ["| wish | bytes a token | MiB a step of 2,048 tokens | of `probs` | for |"]
    lines.append("|---|---|---|---|---|")
    whole = bytes_per_token("probs")
    for encoding, purpose in WISHES_FOR.items():
        size = bytes_per_token(encoding)
        lines.append(
            f"| `{encoding}` | {size:,.0f} | {size * T / 2**20:.0f} | {size / whole:.2f} "
            f"| {purpose} |"
        )
    return "\n".join(lines) + "\n"


def _losses() -> str:
    lines = ["| K | mass left out, mean | total variation distance, mean |", "|---|---|---|"]
    for kept in KEPT:
        rest, distance = lost(kept)
        lines.append(f"| {kept} | {rest:.4f} | {distance:.4f} |")
    return "\n".join(lines) + "\n"


def render(document: str) -> str:
    """The document with its tables made anew."""
    for name, made in (("sizes", _sizes()), ("losses", _losses())):
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        wanted = f"{begin}\n{made}\n{end}"
        document = re.sub(f"{begin}.*?{end}", lambda _, w=wanted: w, document, flags=re.DOTALL)
    return document


if __name__ == "__main__":
    PATH.write_text(render(PATH.read_text(encoding="utf-8")), encoding="utf-8")
