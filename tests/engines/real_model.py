"""A draft for a real chat model, from its own answers to the draft in vLLM. Exits 1 when it fails.

``python -m tests.engines.real_model --python ENGINES_PYTHON``: SmolLM2-135M-Instruct (see
``smollm2.py``) is served through one broker by transformers and by vLLM, which must agree; it
answers some questions; a draft is trained on the answers through the vLLM worker; and
``tests.engines.check`` compares what the draft does here and in vLLM. ``docs/real-model.md`` is
about the same, by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from broker.service import Broker
from tests.engines.vllm_workers import ENVIRONMENT, TOLERANCE, Workers, attached
from trainer_client.targets.remote import RemoteEagle3TargetModel

WORK = Path("build/engines/real-model")
MODEL = Path("build/engines/smollm2")
TOPICS = (
    "gravity",
    "photosynthesis",
    "a volcano",
    "the water cycle",
    "bread",
    "a bicycle",
    "the moon",
    "electricity",
    "a library",
    "democracy",
    "the heart",
    "a bridge",
    "glass",
    "a dictionary",
    "sleep",
    "the internet",
    "a clock",
    "soap",
    "a rainbow",
    "money",
    "tea",
    "a compass",
)
QUESTIONS = (
    "What is {}?",
    "Explain {} to a child.",
    "Write three sentences about {}.",
    "Why is {} important?",
    "How does {} work?",
    "Name two facts about {}.",
    "Describe {} in one paragraph.",
    "Tell me a short story about {}.",
)
_NEW_TOKENS, _TOGETHER = 64, 16


def prompts(topics: int) -> list[str]:
    return [question.format(topic) for topic in TOPICS[:topics] for question in QUESTIONS]


@torch.inference_mode()
def answer(file: Path, topics: int) -> None:
    """Write the model's greedy answers as conversations, but for those that are there."""
    from transformers import AutoModelForCausalLM

    there = len(file.read_text().splitlines()) if file.is_file() else 0
    asked = sorted(prompts(topics), key=len)[there:]
    if not asked:
        return
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    for at in range(0, len(asked), _TOGETHER):
        some = [[{"role": "user", "content": each}] for each in asked[at : at + _TOGETHER]]
        given = tokenizer.apply_chat_template(
            some, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**given, max_new_tokens=_NEW_TOKENS, do_sample=False)
        said = tokenizer.batch_decode(
            made[:, given["input_ids"].shape[1] :], skip_special_tokens=True
        )
        with file.open("a") as answers:
            for turn, text in zip(some, said, strict=True):
                messages = [*turn, {"role": "assistant", "content": text}]
                answers.write(json.dumps({"messages": messages}) + "\n")


def compare(broker: Broker) -> None:
    """The same requests to both workers: states, and what the head makes of the last."""
    endpoint = [broker.client_endpoint]
    draw, worst = torch.Generator().manual_seed(2), 0.0
    with (
        RemoteEagle3TargetModel(endpoint, model="transformers") as one,
        RemoteEagle3TargetModel(endpoint, model="vllm") as other,
    ):
        wish = f"layers={','.join(map(str, one.model_info()['aux_layer_ids']))};last"
        for length in (1, 7, 33, 120):
            ids = torch.randint(10, 40_000, (1, length), generator=draw)
            ours, theirs = (each.supervise(wish, ids).result() for each in (one, other))
            for left, right in ((ours.states, theirs.states), (ours.last, theirs.last)):
                worst = max(worst, float((left - right).norm() / right.norm()))
    print(f"transformers and vLLM through one broker: largest difference {worst:.1e} of the norm")
    if not worst <= TOLERANCE:
        sys.exit("workers of transformers and of vLLM differ on a real model")


def command(*arguments: object) -> None:
    """Run a command of draftmq's. Raises ``SystemExit`` where it fails."""
    line = [sys.executable, "-m", *map(str, arguments)]
    print("$", " ".join(line[1:]), flush=True)
    done = subprocess.run(line, env=os.environ | {"PYTHONPATH": str(Path.cwd())}, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main(python: str, topics: int) -> None:
    """Run everything. Raises ``SystemExit`` with what went wrong."""
    WORK.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ENVIRONMENT
    subprocess.run([python, "-m", "tests.engines.smollm2", MODEL], env=environment, check=True)
    data, run = WORK / f"answers-{topics}.jsonl", WORK / f"run-{topics}"
    answer(data, topics)
    with Broker() as broker:
        theirs = Workers(python, str(MODEL.resolve()), broker.worker_endpoint, WORK)
        ours = Workers(sys.executable, str(MODEL.resolve()), broker.worker_endpoint, WORK, "")
        try:
            ours.start("transformers", "--model-name", "transformers")
            theirs.start("vllm", "--model-name", "vllm")
            attached(broker, ours, 2)
            compare(broker)
            options = {
                "data": data,
                "output": run,
                "model": "vllm",
                "epochs": 1,
                "batch-size": 2,
                "max-length": 160,
                "draft-vocab-size": 4096,
                "ttt-depths": 3,
                "learning-rate": 1e-3,
                "checkpoint-every": 0,
            }
            said = [part for name, value in options.items() for part in (f"--{name}", value)]
            if not (run / "draft").is_dir():
                command("trainer_client", "--broker", broker.client_endpoint, *said)
        finally:
            ours.end()
            theirs.end()
    checked = ["--target", MODEL, "--prompts", data, "--count", 12, "--max-new-tokens", 48]
    command("tests.engines.check", "--draft", run / "draft", "--python", python, *checked)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True)
    parser.add_argument("--topics", type=int, default=len(TOPICS), help="eight questions each")
    given = parser.parse_args()
    main(os.path.abspath(given.python), given.topics)
