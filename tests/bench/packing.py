"""Tokens learned a second from packed samples beside padded ones, of real texts' lengths.

``python tests/bench/packing.py [--of documents|paragraphs] [--pairs 5] [--json]``

The samples are the documents, or the paragraphs, of the embedded target's corpus (Python's
documentation), in its tokenizer; the documents are cut at ``--max-length``. A step learns from the
same samples in both: padded in micro-batches of ``--batch-size``, in the order of a run, or packed.
Only the trainer's part is timed, forward and backward, for what a target of ``--hidden`` would
send; the target saves the padding too.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import statistics
import time
from typing import Any

import torch
from transformers import AutoTokenizer

from trainer_client.data.samples import Sample
from trainer_client.eagle3.config import DraftConfig
from trainer_client.eagle3.draft import Eagle3Draft
from trainer_client.eagle3.packing import shifted
from trainer_client.eagle3.unroll import Eagle3Unroll
from trainer_client.targets.batch import Eagle3TargetBatch, LmHeadRows
from trainer_client.training.data import MicroBatch, collate, in_bins, in_one_row
from worker.targets import EMBEDDED
from worker.targets.embedded import DOCUMENT_SEPARATOR, folder

_SPLIT = {"documents": DOCUMENT_SEPARATOR, "paragraphs": "\n"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--of", choices=_SPLIT, default="documents")
    parser.add_argument("--samples", type=int, default=16, help="Of a step.")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument(
        "--pack",
        type=int,
        default=0,
        help="Tokens (default: of as many samples of the greatest length).",
    )
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--draft-vocab", type=int, default=1024)
    parser.add_argument("--depths", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def lengths(wanted: argparse.Namespace) -> list[int]:
    """Tokens of some samples, drawn of all; the same in each run."""
    corpus = lzma.decompress((folder() / "corpus.txt.xz").read_bytes()).decode()
    texts = random.Random(0).sample(corpus.split(_SPLIT[wanted.of]), wanted.samples * 4)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED, model_max_length=1 << 30)
    tokens = (len(tokenizer(text)["input_ids"]) for text in texts)
    return [min(count, wanted.max_length) for count in tokens if count > 1][: wanted.samples]


class Step:
    """Learns from micro-batches as a trainer does, from states that are noise."""

    def __init__(self, wanted: argparse.Namespace, vocab: int) -> None:
        size = self._size = wanted.hidden
        torch.manual_seed(0)
        config = DraftConfig(
            vocab_size=vocab,
            draft_vocab_size=wanted.draft_vocab,
            target_hidden_size=size,
            hidden_size=size,
            intermediate_size=2 * size,
            num_attention_heads=size // 64,
            num_key_value_heads=size // 64,
            head_dim=64,
            max_position_embeddings=wanted.max_length,
        )
        self._unroll = Eagle3Unroll(
            Eagle3Draft(config, torch.arange(wanted.draft_vocab)), depths=wanted.depths
        )
        self._head = LmHeadRows(torch.randn(wanted.draft_vocab, size) * size**-0.5)

    def seconds(self, parts: list[MicroBatch]) -> float:
        batches = [self._batch(part) for part in parts]
        counts = sum((self._unroll.counts(each) for each in batches), torch.tensor(0))
        began = time.perf_counter()
        for each in batches:
            inputs = each.to_trainer_inputs()
            self._unroll(**inputs, lm_head=self._head, counts=counts).loss.backward()
        return time.perf_counter() - began

    def _batch(self, part: MicroBatch) -> Eagle3TargetBatch:
        shape, lengths = part.input_ids.shape, part.lengths
        mask = shifted(part.loss_mask, lengths)
        return Eagle3TargetBatch(
            aux_hidden_states=torch.randn(*shape, 3 * self._size),
            input_ids=shifted(part.input_ids, lengths),
            attention_mask=part.attention_mask,
            loss_mask=mask,
            last_hidden_state=torch.randn(*shape, self._size),
            position_mask=mask.bool().unsqueeze(-1),
            lengths=lengths,
        )


def main() -> None:
    wanted = arguments()
    torch.set_num_threads(wanted.threads)
    of_each, vocab = lengths(wanted), 4096
    draw = random.Random(1)
    samples = [
        Sample(tuple(draw.randrange(vocab) for _ in range(count)), (1,) * count, "")
        for count in of_each
    ]
    size, pack = wanted.batch_size, wanted.pack or wanted.batch_size * max(of_each)
    padded = [collate(samples[at : at + size]) for at in range(0, len(samples), size)]
    bins = in_bins(range(len(samples)), of_each, pack)
    packed = [in_one_row([samples[number] for number in each]) for each in bins]
    step, found = Step(wanted, vocab), []
    for _ in range(wanted.pairs):
        found.append((step.seconds(padded), step.seconds(packed)))
    row: dict[str, Any] = {
        "samples": len(samples),
        "tokens": sum(of_each),
        "median_tokens": statistics.median(of_each),
        "padding_share": 1 - sum(of_each) / sum(part.input_ids.numel() for part in padded),
        "padded_tokens_per_s": sum(of_each) / statistics.median(pair[0] for pair in found),
        "packed_tokens_per_s": sum(of_each) / statistics.median(pair[1] for pair in found),
        "ratio": statistics.median(pair[0] / pair[1] for pair in found),
    }
    if wanted.json:
        print(json.dumps(row))
        return
    for name, value in row.items():
        print(f"{name.replace('_', ' ')}: {value:,.2f}")


if __name__ == "__main__":
    main()
