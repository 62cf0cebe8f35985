"""Loss masks beside an independent truth: the bytes of each prompt and answer as served."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.trainer_client.data.styles import STYLES, Turn, tokenizer
from trainer_client.training.data import read_dataset

_WORDS = [
    "fox",
    " dog",
    "\n",
    "\n\n",
    "  ",
    "été",
    "日本",
    "🦊",
    "👩‍👩‍👧",
    "e\u0301",
    "{",
    "a<b",
    "1.5",
    "\t",
    "\u200b",
]


def _said(chance: random.Random, *, may_be_empty: bool = False) -> str:
    if may_be_empty and chance.random() < 0.15:
        return ""
    # words at the end: white space there is the template's to trim or to keep
    return "".join(chance.choices(_WORDS, k=chance.randint(1, 8))) + "end"


def conversation(style: str, chance: random.Random) -> tuple[list[Turn], list[Any] | None]:
    """Messages that this family takes, and tools or None."""
    known = STYLES[style]
    messages: list[Turn] = []
    if known.system and style != "gemma" and chance.random() < 0.4:
        messages.append({"role": "system", "content": _said(chance)})
    tools = None
    if known.tools and chance.random() < 0.5:
        tools = [{"type": "function", "function": {"name": "add", "description": _said(chance)}}]
    for _ in range(chance.randint(1, 4)):
        messages.append({"role": "user", "content": _said(chance, may_be_empty=True)})
        if tools and chance.random() < 0.5:
            call = {
                "type": "function",
                "function": {"name": "add", "arguments": {"a": _said(chance)}},
            }
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "content": _said(chance)})
        answer = _said(chance, may_be_empty=True)
        if known.thinks:
            answer = answer.lstrip("\n")
            if chance.random() < 0.5:
                thought = _said(chance).strip("\n")
                answer = f"<think>\n{thought}\n</think>\n\n{answer}"
        messages.append({"role": "assistant", "content": answer})
    return messages, tools


def served(sample: Any, style: str) -> list[tuple[bytes, bytes]]:
    """Of each run of tokens with loss: all bytes before it, and its own."""
    decode = tokenizer(style).backend_tokenizer.decode
    found, begin = [], None
    for at, on in enumerate([*sample.loss_mask, 0]):
        if on and begin is None:
            begin = at
        elif not on and begin is not None:
            parts = (sample.input_ids[:begin], sample.input_ids[begin:at])
            found.append(tuple(decode(list(p), skip_special_tokens=False).encode() for p in parts))
            begin = None
    return found


def check(style: str, count: int, tmp_path: Path, seed: int = 0) -> None:
    chance = random.Random(f"{style}{seed}")
    given = [conversation(style, chance) for _ in range(count)]
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"messages": m} | ({"tools": t} if t else {})) for m, t in given]
    path.write_text("\n".join(lines))
    found: dict[str, list[tuple[bytes, bytes]]] = {}
    for sample in read_dataset(path, tokenizer(style), 1 << 16).samples:
        found.setdefault(sample.origin, []).extend(served(sample, style))
    for number, (messages, tools) in enumerate(given, start=1):
        turns = [index for index, m in enumerate(messages) if m["role"] == "assistant"]
        wanted = [STYLES[style].truth(messages, index, tools) for index in turns]
        as_bytes = [(prompt.encode(), answer.encode()) for prompt, answer in wanted]
        if style == "harmony":  # a history ends turns otherwise than the last turn ends
            assert len(found[f"{path}:{number}"]) == len(turns)
        assert found[f"{path}:{number}"] == as_bytes, messages


@pytest.mark.parametrize("style", ["chatml", "qwen3", "mistral"])
def test_masks_are_the_bytes_that_are_served(style: str, tmp_path: Path) -> None:
    check(style, 50, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_masks_of_many_families_are_the_bytes_that_are_served(style: str, tmp_path: Path) -> None:
    check(style, 200, tmp_path, seed=1)
