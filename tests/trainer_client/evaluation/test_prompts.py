"""What ``draftmq eval`` asks of drafts, targets and prompts before it decodes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from trainer_client.commands.tokenizer import load_tokenizer
from trainer_client.drafts.initial import check_fit
from trainer_client.drafts.layers import aux_layer_ids
from trainer_client.errors import ExportError
from trainer_client.evaluation.prompts import load_prompts
from worker.targets.embedded import folder


def draft(tmp_path: Path, **changes: Any) -> Path:
    config = {"hidden_size": 64, "vocab_size": 100, "eagle_aux_hidden_state_layer_ids": [2, 4, 6]}
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    return tmp_path


def test_the_layers_of_a_draft_are_read_from_either_place(tmp_path: Path) -> None:
    assert aux_layer_ids(draft(tmp_path)) == (1, 3, 5)
    nested = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3], "use_aux_hidden_state": True}
    assert aux_layer_ids(draft(tmp_path, eagle_config=nested)) == (1, 2, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_aux_hidden_state": False}, "use_aux_hidden_state: false"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state: false"),
        ({"num_aux_hidden_states": 4}, "says that it reads 4 hidden states, and names the layers"),
        ({"eagle_config": {"num_aux_hidden_states": 4}}, "reads 4 hidden states, and names"),
    ],
)
def test_a_draft_of_another_network_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ExportError, match=said):
        aux_layer_ids(draft(tmp_path, **changes))


def test_the_wrong_target_is_one_sentence_with_both_numbers(tmp_path: Path) -> None:
    check_fit(draft(tmp_path), "right", 64, 100)
    with pytest.raises(ExportError, match=r"not made for 'wrong': .* 64 and the target 128; name"):
        check_fit(draft(tmp_path), "wrong", 128, 100)
    said = re.escape("hidden size 64 and the target 32, and a vocabulary 100 and the target 50")
    with pytest.raises(ExportError, match=said):
        check_fit(draft(tmp_path), "wrong", 32, 50)


def test_prompts_end_where_answers_begin_and_each_is_asked_once(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    data = tmp_path / "chats.jsonl"
    asked = ["one", "two", "two", "a longer question of some more words " * 20]
    records = [
        {"prompt": f"Be brief. {question}\n", "completion": "an answer"} for question in asked
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    prompts = load_prompts(load_tokenizer(str(folder()), False), "x", data, 16, 8)
    tokenizer = AutoTokenizer.from_pretrained(folder())
    texts = [tokenizer.decode(ids) for ids in prompts]
    assert len(prompts) == 3
    for text, question in zip(texts, ("one", "two", asked[3]), strict=True):
        assert text.endswith(f"Be brief. {question}\n")


def test_running_text_is_cut_to_so_many_tokens(tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 30)
    assert {
        len(ids) for ids in load_prompts(load_tokenizer(str(folder()), False), "x", data, 2, 8)
    } == {8}


def test_prompts_are_rendered_with_the_template_that_was_trained_with(tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    template = "{% for m in messages %}[{{ m.role }} {{ tone }}] {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant {{ tone }}] {% endif %}"
    tokenizer = load_tokenizer(str(folder()), False)
    options = {"chat_template": template, "tone": "calm"}
    (prompt,) = load_prompts(tokenizer, "x", data, 16, 8, options)
    assert tokenizer.decode(prompt).endswith("[user calm] one\n[assistant calm] ")
