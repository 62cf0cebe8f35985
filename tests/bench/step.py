"""Time and peak memory of one training step (forward and backward), by what the target sends.

``python tests/bench/step.py [--tokens 2048 --hidden 1024 --draft-vocab 8192] [--json]``

Each encoding is measured in a process of its own, so that one's peak is not another's.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

ENCODINGS = ("probs", "hidden", "logits")
_SIZES = ("tokens", "hidden", "draft_vocab", "vocab", "depths", "rounds", "threads")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--draft-vocab", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--depths", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--attention", choices=("auto", "reference"), default="auto")
    parser.add_argument(
        "--compare", type=int, metavar="N", help="Time auto beside reference, N alternated pairs."
    )
    parser.add_argument("--encoding", choices=ENCODINGS, help="Only this one, in this process.")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(wanted: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step, and bytes at its peak beyond the draft and the batch."""
    import torch

    from trainer_client.eagle3.config import DraftConfig
    from trainer_client.eagle3.draft import Eagle3Draft
    from trainer_client.eagle3.unroll import Eagle3Unroll

    torch.set_num_threads(wanted.threads)
    torch.manual_seed(0)
    size, known = wanted.hidden, torch.arange(wanted.draft_vocab)
    config = DraftConfig(
        vocab_size=wanted.vocab,
        draft_vocab_size=wanted.draft_vocab,
        target_hidden_size=size,
        hidden_size=size,
        intermediate_size=2 * size,
        num_attention_heads=size // 64,
        num_key_value_heads=size // 64,
        head_dim=64,
        max_position_embeddings=2 * wanted.tokens,
    )
    draft = Eagle3Draft(config, known)
    draft.attention = wanted.attention
    unroll = Eagle3Unroll(draft, depths=wanted.depths)
    inputs = batch(wanted, torch)
    for parameter in draft.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    before, seconds = peak_bytes(), []
    for _ in range(wanted.rounds):
        began = time.perf_counter()
        output = unroll(**inputs)
        output.loss.backward()
        seconds.append(time.perf_counter() - began)
    return {
        "seconds": statistics.median(seconds),
        "peak_mib": (peak_bytes() - before) / 2**20,
        "loss": float(output.loss),
    }


def batch(wanted: argparse.Namespace, torch: Any) -> dict[str, Any]:
    """What a trainer gives the unroll in this encoding."""
    from trainer_client.targets.batch import LmHeadRows

    length, size, vocab = wanted.tokens, wanted.hidden, wanted.draft_vocab
    ids = torch.randint(0, wanted.vocab, (1, length))
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "loss_mask": torch.ones_like(ids),
        "aux_hidden_states": torch.randn(1, length, 3 * size),
    }
    if wanted.encoding == "logits":
        return inputs | {"target_logits": torch.randn(1, length, wanted.vocab)}
    inputs["position_mask"] = torch.rand(1, length, 1) < 0.95
    if wanted.encoding == "probs":
        probs = torch.empty(1, length, vocab)
        for at in range(length):  # without a peak of its own
            probs[0, at] = torch.softmax(torch.randn(vocab), -1)
        return inputs | {"target_probs": probs}
    head = LmHeadRows(torch.randn(vocab, size) * size**-0.5)
    return inputs | {"last_hidden_state": torch.randn(1, length, size), "lm_head": head}


def compare(wanted: argparse.Namespace) -> dict[str, float]:
    """Merged attention beside the reference: medians of alternated pairs, and their ratio."""
    found: dict[str, list[dict[str, float]]] = {"auto": [], "reference": []}
    sizes = [f"--{name.replace('_', '-')}={getattr(wanted, name)}" for name in _SIZES]
    for _ in range(wanted.compare):
        for attention, rows in found.items():
            command = [sys.executable, __file__, *sizes, f"--attention={attention}"]
            command.append(f"--encoding={wanted.encoding or 'hidden'}")
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout))
    ours, theirs = (statistics.median(row["seconds"] for row in rows) for rows in found.values())
    peaks = [statistics.median(row["peak_mib"] for row in rows) for rows in found.values()]
    losses = [rows[0]["loss"] for rows in found.values()]
    return {
        "seconds": ours,
        "reference_seconds": theirs,
        "ratio": ours / theirs,
        "peak_ratio": peaks[0] / peaks[1],
        "loss_difference": abs(losses[0] - losses[1]),
    }


def main() -> None:
    wanted = arguments()
    if wanted.compare:
        print(json.dumps(compare(wanted)))
        return
    if wanted.encoding:
        print(json.dumps(measure(wanted)))
        return
    rows = {}
    for encoding in ENCODINGS:
        command = [sys.executable, __file__, *sys.argv[1:], "--encoding", encoding]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows[encoding] = json.loads(done.stdout)
    if wanted.json:
        print(json.dumps(rows))
        return
    print("| encoding | seconds a step | peak MiB |\n|---|---|---|")
    for encoding, row in rows.items():
        print(f"| `{encoding}` | {row['seconds']:.2f} | {row['peak_mib']:.0f} |")


if __name__ == "__main__":
    main()
