"""Text in the embedded target's own words: what a draft meets when it is used.

EAGLE-3 (arXiv:2503.01840, section 4) and SpecForge train on answers that the target regenerated,
since a draft is judged on the target's text and not on the corpus'. This writes
``continuations.jsonl.xz``: beginnings from the training documents, continued greedily.

    python -m tests.embedded_making.continuations [--count 2000] [--output DIR]
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path

import torch
from rich.progress import track
from transformers import AutoTokenizer

from worker.targets import EMBEDDED, load_target
from worker.targets.embedded import corpus

PROMPT_TOKENS, NEW_TOKENS, BATCH = 32, 96, 50


@torch.no_grad()
def continuations(count: int) -> list[str]:
    """``count`` texts, from beginnings spread evenly over the training documents."""
    target, tokenizer = load_target("embedded"), AutoTokenizer.from_pretrained(EMBEDDED)
    tokens = tokenizer(corpus(), add_special_tokens=False, verbose=False)["input_ids"]
    stride = len(tokens) // count
    prompts = torch.tensor(
        [tokens[at : at + PROMPT_TOKENS] for at in range(0, stride * count, stride)]
    )
    texts: list[str] = []
    for begin in track(range(0, count, BATCH), description="continuing"):
        batch = prompts[begin : begin + BATCH]
        whole = target.model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        texts += tokenizer.batch_decode(whole, skip_special_tokens=True)
    return texts


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=EMBEDDED)
    options = parser.parse_args()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in continuations(options.count))
    path = options.output / "continuations.jsonl.xz"
    path.write_bytes(lzma.compress(lines.encode(), preset=9))
    print(f"{options.count} texts, {path.stat().st_size} bytes in {path}")


if __name__ == "__main__":
    main()
