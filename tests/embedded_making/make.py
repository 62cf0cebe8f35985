"""Makes the embedded target: `python -m tests.embedded_making.make --output DIR`.

Without `--docs` it trains on the shipped corpus, so it needs nothing but this package. With
`--docs` it first makes that corpus anew from the HTML of Debian's package `python3.11-doc` (its
folder `usr/share/doc/python3.11/html`, installed or unpacked). DIR becomes a model folder: config,
weights, tokenizer, corpus. The same steps and threads on the same machine give the same bytes.
"""

from __future__ import annotations

import json
import lzma
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.embedded_making.corpus import build_corpus
from tests.embedded_making.muon import Muon
from worker.targets import embedded

SEED = 20_11
VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"  # id 0: begins, ends and pads

#: Deep and narrow: a one-layer draft then costs about a twelfth of a target forward, and the layers
#: 1, n/2-1 and n-4 are far apart.
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

TOKENS_PER_STEP = 2048
SHORT_TOKENS, LONG_TOKENS = 256, 1024  # sequence lengths: the last steps teach the later positions
LONG_SHARE = 0.1  # of the steps
PEAK_MATRIX_LEARNING_RATE = 0.02  # of Muon, for the layers' matrices
PEAK_LEARNING_RATE = 5e-3  # of AdamW, for the embedding and the norms
WARMUP_STEPS = 50

#: Plain words instead of special tokens: the text has none, so they would stay untrained.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "Answer:{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ ('Question: ' if message['role'] == 'user' else '') + message['content'] + '\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer: any text round-trips, nothing is added to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def token_stream(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """Return all documents' token ids, each followed by the end of text, as int64 [N]."""
    ids = [i for e in tokenizer.encode_batch(documents) for i in (*e.ids, 0)]
    return torch.tensor(ids, dtype=torch.int64)


def batches(stream: Tensor, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield int64 [B, T] batches of random windows; T is long for the last steps."""
    for step in range(steps):
        length = LONG_TOKENS if step >= (1 - LONG_SHARE) * steps else SHORT_TOKENS
        starts = torch.randint(
            len(stream) - length + 1, (TOKENS_PER_STEP // length, 1), generator=generator
        )
        yield stream[starts + torch.arange(length)]


def schedule(step: int, steps: int) -> float:
    """Return the learning rate of a step as a share of its peak: linear warm-up, then a cosine."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return 0.5 * (1 + math.cos(math.pi * progress))


def next_token_loss(model: LlamaForCausalLM, input_ids: Tensor) -> Tensor:
    """Return the mean cross-entropy (nats a token, float32 scalar) of int64 [B, T] ids."""
    logits = model(input_ids=input_ids, use_cache=False).logits  # [B, T, V]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, stream: Tensor, length: int = SHORT_TOKENS) -> float:
    """Return the mean cross-entropy (nats a token) over consecutive windows of a token stream."""
    windows = stream[: len(stream) // length * length].view(-1, length)
    chunks = windows.split(TOKENS_PER_STEP // length)
    return sum(next_token_loss(model, c).item() * len(c) for c in chunks) / len(windows)


def train(stream: Tensor, heldout: Tensor, steps: int) -> LlamaForCausalLM:
    """Train the model from scratch, with a line of progress every 50 steps."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE))
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [model.model.embed_tokens.weight, *(p for p in model.parameters() if p.ndim == 1)]
    optimizers = {
        Muon(matrices, lr=0.0): PEAK_MATRIX_LEARNING_RATE,
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0): PEAK_LEARNING_RATE,
    }
    generator = torch.Generator().manual_seed(SEED)
    began_s, recent = time.monotonic(), 0.0
    for step, input_ids in enumerate(batches(stream, steps, generator)):
        optimizer: torch.optim.Optimizer
        for optimizer, peak in optimizers.items():
            optimizer.param_groups[0]["lr"] = peak * schedule(step, steps)
        loss = next_token_loss(model, input_ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent = loss.item() if step == 0 else 0.98 * recent + 0.02 * loss.item()
        done = step + 1
        if done % 50 == 0 or done == steps:
            elapsed_s = time.monotonic() - began_s
            line = f"step {done}/{steps}  loss {recent:.3f}"
            if done % 1000 == 0:
                line += f"  held-out {heldout_loss(model, heldout):.3f}"
            left_s = elapsed_s / done * (steps - done)
            rate = done * TOKENS_PER_STEP / elapsed_s
            click.echo(f"{line}  {rate:,.0f} tokens/s  {left_s:.0f} s left")
    return model.eval()


def write_model(model: LlamaForCausalLM, output: Path) -> None:
    """Write config and weights: stored as float16, while the config asks for float32.

    Loaders take the config's dtype, so that everybody computes in float32 unless told otherwise.
    """
    config = model.config.to_diff_dict() | ARCHITECTURE
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "torch_dtype": "float32"}
    config.pop("transformers_version", None)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(output / "config.json", config)
    _write_json(output / "generation_config.json", {"do_sample": False, **generation})
    weights = {  # the tied head is the embedding, stored once
        name: tensor.to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    (output / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))


def write_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    """Write tokenizer.json and a tokenizer_config.json that transformers 4 and 5 both read."""
    tokenizer.save(str(output / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": ARCHITECTURE["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(output / "tokenizer_config.json", settings)


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to fill.")
@click.option(
    "--docs",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The html folder of python3.11-doc, to make the corpus anew. Default: the shipped corpus.",
)
@click.option("--steps", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
def main(output: Path, docs: Path | None, steps: int, threads: int) -> None:
    """Make the embedded target in the folder OUTPUT."""
    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    packed_corpus = (
        lzma.compress(build_corpus(docs).encode(), preset=9 | lzma.PRESET_EXTREME)
        if docs
        else (embedded.folder() / "corpus.txt.xz").read_bytes()
    )
    (output / "corpus.txt.xz").write_bytes(packed_corpus)
    training, heldout = embedded.split(embedded.documents(output / "corpus.txt.xz"))
    tokenizer = train_tokenizer(training)
    write_tokenizer(tokenizer, output)
    stream, heldout_stream = (token_stream(tokenizer, part) for part in (training, heldout))
    click.echo(f"{len(stream):,} tokens to train on, {len(heldout_stream):,} held out")

    model = train(stream, heldout_stream, steps)
    write_model(model, output)
    stored = LlamaForCausalLM.from_pretrained(output, dtype=torch.float32)
    for name, held in (("float32", model), ("as stored", stored)):
        loss = heldout_loss(held, heldout_stream)
        click.echo(f"held-out loss {loss:.4f}, perplexity {math.exp(loss):.2f} ({name})")


if __name__ == "__main__":
    main()
