"""What a worker of an 8B-shaped target supplies, beside its forward alone: ``... supply OUT``.

Broker and worker run in this process, with random weights in the shape of Qwen3-8B. A client in a
process of its own takes replies in order and throws them away, by each way that a trainer may use.
"""

from __future__ import annotations

import argparse
import collections
import json
import subprocess
import sys
import time
from typing import Any

import torch

from broker.service import Broker
from tests.gpu.programs import DEVICE, GPU, card, say, timed_ms
from tests.vocab import shuffled
from worker.service import Worker
from worker.targets.huggingface import HuggingFaceTarget

#: rows, tokens a row
SHAPES = ((1, 2048), (4, 2048)) if GPU else ((1, 16),)
DEPTH, VOCAB_SENT = 4, 32000
#: direct, the trainer's device, rows
WAYS = (
    (
        ("ipc", "cuda:0", 1),
        ("ipc", "cuda:0", 4),
        ("off", "cuda:0", 1),
        ("off", "cpu", 4),
        ("shm", "cpu", 4),
    )
    if GPU
    else (("shm", "cpu", 1), ("off", "cpu", 1))
)


def target() -> HuggingFaceTarget:
    """Qwen3-8B's shape with random weights; a tiny one without a GPU."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=4096 if GPU else 64,
        intermediate_size=12288 if GPU else 128,
        num_hidden_layers=36 if GPU else 8,
        num_attention_heads=32 if GPU else 4,
        num_key_value_heads=8 if GPU else 2,
        head_dim=128 if GPU else 16,
        vocab_size=151936 if GPU else 512,
        max_position_embeddings=8192,
    )
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if GPU else torch.float32)
    try:
        with DEVICE:
            model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(kept)
    return HuggingFaceTarget(model, name="shape")


def alone(served: HuggingFaceTarget) -> dict[str, float]:
    """Tokens a second of the forward, nothing sent."""
    found = {}
    for rows, tokens in SHAPES:
        ids = torch.randint(0, 500, (rows, tokens), device=DEVICE)

        def forward(ids: torch.Tensor = ids) -> None:
            with torch.inference_mode():
                served.forward(ids, torch.ones_like(ids))

        middle = sorted(timed_ms(forward, 7))[3]
        found[f"{rows}x{tokens}"] = 1000 * rows * tokens / middle
    return found


def take(url: str, direct: str, device: str, rows: int, seconds: float) -> dict[str, Any]:
    """A client's part: what arrives in a second."""
    from trainer_client import RemoteEagle3TargetModel

    tokens = SHAPES[0][1]
    remote = RemoteEagle3TargetModel.from_urls(
        [url], device=device, timeout=60, encoding="hidden", direct=direct
    )
    with remote:
        vocab = remote.model_info()["vocab_size"]
        sent = torch.arange(vocab) < VOCAB_SENT
        remote.set_vocab_mapping(shuffled(torch.nonzero(sent).flatten()), sent)
        draw = torch.Generator().manual_seed(1)
        pending: collections.deque[Any] = collections.deque()

        def ask() -> None:
            ids = torch.randint(0, 500, (rows, tokens), generator=draw)
            ones = torch.ones_like(ids)
            pending.append(remote.generate_batch_async(ids, ones, ones))

        for _ in range(DEPTH):
            ask()
        for _ in range(DEPTH):  # the first ones build channels and warm up
            pending.popleft().result()
            ask()
        began, batches, nbytes = time.perf_counter(), 0, 0
        while time.perf_counter() < began + seconds:
            nbytes += pending.popleft().result().nbytes
            batches += 1
            ask()
        took, counters = time.perf_counter() - began, remote.counters()
    return {
        "direct": direct,
        "device": device,
        "rows": rows,
        "tokens_per_s": batches * rows * tokens / took,
        "gib_per_s": nbytes / took / 2**30,
        "direct_replies": counters["direct"],
        "direct_failed": counters["direct_failed"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--seconds", type=float, default=6.0 if GPU else 1.0)
    parser.add_argument("--client", nargs=4, metavar=("URL", "DIRECT", "DEVICE", "ROWS"))
    wanted = parser.parse_args()
    if wanted.client:
        url, direct, device, rows = wanted.client
        print(json.dumps(take(url, direct, device, int(rows), wanted.seconds)))
        return
    served = target()
    found: dict[str, Any] = card() | {"forward_tokens_per_s": alone(served), "ways": []}
    with Broker() as broker, Worker(served, broker.worker_endpoint, name="shape"):
        for way in WAYS:
            command = [sys.executable, "-m", "tests.gpu.supply", "-", "--seconds"]
            command += [str(wanted.seconds), "--client", broker.client_endpoint, *map(str, way)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            error = {"way": way, "error": done.stderr[-500:]}
            found["ways"].append(json.loads(done.stdout) if done.returncode == 0 else error)
    say(found, wanted.out)


if __name__ == "__main__":
    main()
