"""The training step in the shapes that people train: ``python -m tests.gpu.step OUT``.

Time by events on the GPU, time of the host's launches alone, and the share of the rate that a
matrix product reaches on this card in the same run. Each case runs with merged attention and with
the reference.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tests.gpu.programs import DEVICE, GPU, card, say, settle, timed_ms
from trainer_client.eagle3.config import DraftConfig
from trainer_client.eagle3.draft import Eagle3Draft
from trainer_client.eagle3.unroll import Eagle3Unroll
from trainer_client.targets.batch import LmHeadRows
from trainer_client.training.trainer import make_optimizer

DTYPE = torch.bfloat16 if GPU else torch.float32


@dataclass(frozen=True)
class Model:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int


MODELS = {
    "0.6B": Model(1024, 16, 8, 128, 3072, 151936),
    "8B": Model(4096, 32, 8, 128, 12288, 151936),
    "tiny": Model(64, 4, 2, 16, 128, 512),
}


@dataclass(frozen=True)
class Case:
    model: str
    tokens: int
    draft_vocab: int
    depths: int
    steps: int

    def flops(self) -> float:
        """Of forward and backward (twice that) and of the target's head; attention at mean T/2."""
        of = MODELS[self.model]
        layer = 2 * of.hidden * (of.heads + 2 * of.kv_heads) * of.head_dim
        layer += of.heads * of.head_dim * of.hidden + 3 * of.hidden * of.intermediate
        attention = 2 * self.tokens * of.heads * of.head_dim
        head = self.draft_vocab * of.hidden
        products = 6 * (3 * of.hidden**2 + self.depths * (layer + head))
        return self.tokens * (products + 3 * self.depths * attention + 2 * head)


CASES = (
    Case("0.6B", 2048, 32000, 3, 12),
    Case("0.6B", 2048, 32000, 7, 8),
    Case("8B", 2048, 32000, 7, 6),
    Case("8B", 8192, 32000, 7, 3),
)
TINY = (Case("tiny", 300, 128, 3, 2),)


def prepared(case: Case) -> tuple[Eagle3Unroll, dict[str, Any]]:
    """A draft and a batch of one row in the encoding ``hidden``."""
    of = MODELS[case.model]
    torch.manual_seed(0)
    config = DraftConfig(
        vocab_size=of.vocab,
        draft_vocab_size=case.draft_vocab,
        target_hidden_size=of.hidden,
        hidden_size=of.hidden,
        intermediate_size=of.intermediate,
        num_attention_heads=of.heads,
        num_key_value_heads=of.kv_heads,
        head_dim=of.head_dim,
        max_position_embeddings=2 * case.tokens,
    )
    with DEVICE:  # a GPU draws the weights faster
        draft = Eagle3Draft(config, torch.arange(case.draft_vocab))
        ids = torch.randint(0, of.vocab, (1, case.tokens))
        head = torch.randn(case.draft_vocab, of.hidden, dtype=DTYPE) * of.hidden**-0.5
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "loss_mask": torch.ones_like(ids),
            "aux_hidden_states": torch.randn(1, case.tokens, 3 * of.hidden, dtype=DTYPE),
            "position_mask": torch.rand(1, case.tokens, 1) < 0.95,
            "last_hidden_state": torch.randn(1, case.tokens, of.hidden, dtype=DTYPE),
            "lm_head": LmHeadRows(head),
        }
    return Eagle3Unroll(draft, depths=case.depths), inputs


def measure(case: Case, attention: str) -> dict[str, float]:
    unroll, inputs = prepared(case)
    unroll.draft.attention = attention
    trained = [weight for weight in unroll.parameters() if weight.requires_grad]
    optimizer = make_optimizer(unroll.draft, 1e-4, 0.0)
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    took_ms, host_ms, loss = [], [], torch.zeros(())
    for number in range(2 + case.steps):
        settle()
        began = time.perf_counter()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=GPU):
            output = unroll(**inputs)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        launched = time.perf_counter()
        settle()
        if number >= 2:
            took_ms.append(1000 * (time.perf_counter() - began))
            host_ms.append(1000 * (launched - began))
        loss = output.loss.detach()
    peak = torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0
    middle = statistics.median(took_ms)
    return {
        "ms": middle,
        "host_ms": statistics.median(host_ms),
        "tokens_per_s": 1000 * case.tokens / middle,
        "tflops": case.flops() / middle / 1e9,
        "peak_gib": peak,
        "loss": float(loss),
    }


def product_tflops() -> float:
    """The rate of a large matrix product in the step's dtype on this device, now."""
    size = 8192 if GPU else 512
    a, b = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return 2 * size**3 / statistics.median(timed_ms(lambda: a @ b, 10)) / 1e9


def rows(budget_s: float) -> Iterator[dict[str, Any]]:
    ends, rate = time.monotonic() + budget_s, product_tflops()
    for case in CASES if GPU else TINY:
        for attention in ("auto", "reference"):
            if time.monotonic() > ends:
                return
            found = measure(case, attention)
            share = found["tflops"] / rate
            yield vars(case) | {"attention": attention, "share_of_product": share} | found
            gc.collect()
            if GPU:
                torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--budget-s", type=float, default=75.0)
    wanted = parser.parse_args()
    say(card() | {"cases": list(rows(wanted.budget_s))}, wanted.out)


if __name__ == "__main__":
    main()
