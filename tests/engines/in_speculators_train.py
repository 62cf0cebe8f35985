"""Runs in the engines' environment: speculators' own data set, loader and models on our workers.

``in_speculators_train URL VERIFIER TEXT DATA`` writes the data set DATA of a text, and trains
drafts of three of its families for a few steps.
Exits 1 where a check of theirs fails or a loss is no number. Their ``Trainer`` needs an
accelerator, so the loop is here; all else is theirs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from speculators.data_generation.offline import check_hidden_states
from speculators.model import SpeculatorModel
from speculators.models.eagle3.data import shift_batch
from speculators.train.cli import build_draft_model, parse_vocab_mappings
from speculators.train.dataloader import create_train_val_loaders
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer_client.speculators.backend import Backend

#: family -> steps, and what it wants beside the defaults
FAMILIES: dict[str, tuple[int, list[str]]] = {
    "eagle3": (5, ["--target-layer-ids", "2", "6", "9"]),
    "dflash": (2, ["--target-layer-ids", "2", "4", "6", "10", "12", "--block-size", "4"]),
    "dspark": (2, ["--target-layer-ids", "12", "4", "6", "10", "2", "--block-size", "4"]),
}
_SAMPLES, _LENGTH = 24, 512


def write_data(text: Path, verifier: str, folder: str) -> None:
    """Samples of unequal lengths as their preprocessing writes them."""
    ids = AutoTokenizer.from_pretrained(verifier)(text.read_text(encoding="utf-8"))["input_ids"]
    rows, at = [], 0
    for number in range(_SAMPLES):
        length = 24 + 11 * number % 97
        rows.append(ids[at : at + length])
        at += length
    dataset = Dataset.from_dict(
        {
            "input_ids": rows,
            "loss_mask": [[int(at >= 8) for at in range(len(row))] for row in rows],
            "seq_len": [len(row) for row in rows],
        }
    )
    dataset.set_format("torch")
    dataset.save_to_disk(folder)


def arguments(url: str, verifier: str, data: str, family: str) -> argparse.Namespace:
    """As their command would read them."""
    from speculators.train.config import TrainConfig

    wanted = ["--speculator-type", family, "--verifier-name-or-path", verifier]
    wanted += ["--data-path", data, "--save-path", f"{data}/out", "--num-workers", "1"]
    wanted += ["--total-seq-len", str(_LENGTH), "--hidden-states-backend", "draftmq"]
    wanted += ["--draftmq", url, "--draft-attn-impl", "eager", "--hidden-states-dtype", "float32"]
    wanted += ["--loss-implementation", "eager"]
    return argparse.Namespace(**TrainConfig.resolve([*wanted, *FAMILIES[family][1]]).flatten())


def loader_of(args: argparse.Namespace, model: Any, family: str) -> Any:
    """Their loader of training batches, over our backend."""
    return create_train_val_loaders(
        data_path=args.data_path,
        total_seq_len=args.total_seq_len,
        hidden_states_dtype=torch.float32,
        transfer=Backend.from_train_args(args, args.data_path),
        vllm_endpoint="http://127.0.0.1:9",  # nobody is there, and nobody is asked
        on_missing="raise",
        verifier_name_or_path=args.verifier_name_or_path,
        request_timeout=10.0,
        max_retries=0,
        generation_validation_retries=0,
        max_consecutive_generation_failures=1,
        hidden_size=model.config.transformer_layer_config.hidden_size,
        num_target_layers=len(model.target_layer_ids),
        num_workers=args.num_workers,
        prefetch_factor=2,
        preprocess=shift_batch if family == "eagle3" else None,
        train_data_ratio=args.train_data_ratio,
    )[0]


def train(url: str, verifier: str, data: str, family: str) -> list[float]:
    """The losses of a few steps."""
    args = arguments(url, verifier, data, family)
    kind = SpeculatorModel.registry[family]
    d2t, t2d, vocabulary = parse_vocab_mappings(args)
    model: Any = build_draft_model(args, kind, t2d, d2t, vocabulary).float()
    options, _ = kind.get_trainer_kwargs(**vars(args))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses: list[float] = []
    steps = FAMILIES[family][0]
    while len(losses) < steps:
        for batch in loader_of(args, model, family):
            assert not batch["error_records"], batch["error_records"]
            tensors = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}
            _, loss, _ = model(**tensors, **(options or {}))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
            if len(losses) == steps:
                break
    return losses


def check_samples(url: str, verifier: str, data: str) -> None:
    """Their own check of ids, shapes and finiteness on every sample, and the states of one: theirs
    of layer k are transformers' ``hidden_states[k]``, and the last are normed by the model.
    """
    args = arguments(url, verifier, data, "eagle3")
    transfer = Backend.from_train_args(args, data)
    for number in range(_SAMPLES):
        sample = transfer.get_cached(number)
        check_hidden_states(sample, sample["token_ids"].tolist())
    ids, states = sample["token_ids"], sample["hidden_states"]
    verifier_model = AutoModelForCausalLM.from_pretrained(verifier, dtype=torch.float32)
    with torch.no_grad():
        whole = verifier_model(input_ids=ids[None], output_hidden_states=True).hidden_states
        normed = verifier_model.model.norm(states[:, -1])
    for at, layer in enumerate(args.target_layer_ids):
        torch.testing.assert_close(states[:, at], whole[layer][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(normed, whole[-1][0], atol=1e-4, rtol=1e-4)


def main(url: str, verifier: str, text: str, data: str) -> None:
    torch.manual_seed(0)
    write_data(Path(text), verifier, data)
    check_samples(url, verifier, data)
    made = {family: train(url, verifier, data, family) for family in FAMILIES}
    print(json.dumps(made))
    for family, losses in made.items():
        if not all(torch.tensor(losses).isfinite()):
            sys.exit(f"{family}: a loss is no number: {losses}")


if __name__ == "__main__":
    main(*sys.argv[1:])
