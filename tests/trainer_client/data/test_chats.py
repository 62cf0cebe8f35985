"""What of a conversation has loss, for chat templates of all kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer_client.data.chats import tokenizer
from trainer_client.data import records
from trainer_client.errors import DataError
from trainer_client.training.data import Dataset, read_dataset

USER, SAYS = "user", "assistant"


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


TWO = [turn(USER, "Hello"), turn(SAYS, "Hi!"), turn(USER, "2+2?"), turn(SAYS, "4")]
SHARED = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]
IN_PARTS = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
THOUGHT = [
    turn("system", "Brief."),
    turn(USER, "Hello"),
    turn(SAYS, "<think>\ngreet\n</think>\n\nHi!"),
    turn(USER, "2+2?"),
    turn(SAYS, "<think>\nadd\n</think>\n\n4"),
]


def read(
    tmp_path: Path, style: str, *records: Any, name: str = "a.jsonl", **options: Any
) -> Dataset:
    path = tmp_path / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_dataset(path, tokenizer(style), 4096, **options)


def said(dataset: Dataset, style: str) -> list[tuple[str, str]]:
    """Of each piece with loss: what comes before it in its sample, and the piece."""
    decode, found = tokenizer(style).decode, []
    for sample in dataset.samples:
        begin = None
        for at, on in enumerate([*sample.loss_mask, 0]):
            if on and begin is None:
                begin = at
            elif not on and begin is not None:
                found.append((decode(sample.input_ids[:begin]), decode(sample.input_ids[begin:at])))
                begin = None
    return found


@pytest.mark.parametrize(
    ("style", "answers"),
    [
        ("plain", ["Hi!<|im_end|>", "4<|im_end|>"]),
        ("thinking", ["Hi!<|im_end|>", "4<|im_end|>"]),
        ("ended", ["Hi!<|end|>", "4<|end|>"]),
        ("headers", ["Hi!<|eot|>", "4<|eot|>"]),
        ("strict", ["Hi!<|end|>", "4<|end|>"]),
        ("opened", ["Hi!<|end|>", "4<|end|>"]),
    ],
)
def test_loss_is_on_each_answer_with_its_stop_token(
    tmp_path: Path, style: str, answers: list[str]
) -> None:
    dataset = read(tmp_path, style, {"messages": TWO})
    assert [piece for _, piece in said(dataset, style)] == answers


def test_thoughts_are_learned_with_the_history_that_serving_shows(tmp_path: Path) -> None:
    (_, first), (before, second) = said(
        read(tmp_path, "thinking", {"messages": THOUGHT}), "thinking"
    )
    assert first == "<think>\ngreet\n</think>\n\nHi!<|im_end|>"
    assert second == "<think>\nadd\n</think>\n\n4<|im_end|>"
    assert "greet" not in before
    assert before.endswith("<|im_start|>assistant\n")


def test_a_thought_that_the_prompt_opens_is_gone_on_with(tmp_path: Path) -> None:
    (before, first), _ = said(read(tmp_path, "opened", {"messages": THOUGHT}), "opened")
    assert before.endswith("<|assistant|><think>\n")
    assert first == "greet\n</think>\n\nHi!<|end|>"


def test_an_empty_thought_that_the_prompt_supplies_has_no_loss(tmp_path: Path) -> None:
    for before, _ in said(read(tmp_path, "thinking", {"messages": TWO}), "thinking"):
        assert before.endswith("<think>\n\n</think>\n\n")


def test_tools_are_in_the_prompt_and_calls_are_learned(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    record = {
        "messages": [
            turn(USER, "2+2?"),
            turn(SAYS, None, tool_calls=[call]),
            turn("tool", "4"),
            turn(SAYS, "It is 4."),
        ],
        "tools": [{"type": "function", "function": {"name": "add", "description": "Adds."}}],
    }
    (before, first), (_, second) = said(read(tmp_path, "thinking", record), "thinking")
    assert '"description": "Adds."' in before
    assert first == '<call>{"name": "add", "arguments": {"a": 2}}</call><|im_end|>'
    assert second == "It is 4.<|im_end|>"


def test_a_conversation_that_begins_with_the_assistant(tmp_path: Path) -> None:
    record = {"messages": [turn(SAYS, "Welcome."), *TWO[:2]]}
    for style, stop in (("plain", "<|im_end|>"), ("headers", "<|eot|>")):
        pieces = [piece for _, piece in said(read(tmp_path, style, record), style)]
        assert pieces == [f"Welcome.{stop}", f"Hi!{stop}"]
    with pytest.raises(DataError, match=r"a\.jsonl:1: the chat template does not take this: turns"):
        read(tmp_path, "strict", record)


def test_a_turn_of_weight_0_has_no_loss_and_the_last_alone_may_have_some(tmp_path: Path) -> None:
    weighed = [TWO[0], TWO[1] | {"weight": 0}, *TWO[2:]]
    only_last = [
        [piece for _, piece in said(dataset, "plain")]
        for dataset in (
            read(tmp_path, "plain", {"messages": weighed}),
            read(tmp_path, "plain", {"messages": TWO}, loss_on="last"),
        )
    ]
    assert only_last == [["4<|im_end|>"]] * 2


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("a.json", {"messages": TWO[:2]}),
        ("a.JSONL", {"messages": TWO[:2]}),
        ("a.ndjson", {"text": None, "messages": TWO[:2]}),
        (
            "a",
            {
                "conversations": [
                    {"from": "human", "value": "Hello"},
                    {"from": "gpt", "value": "Hi!"},
                ]
            },
        ),
        (
            "a.json",
            [
                {
                    "conversations": [
                        {"from": "human", "value": "Hello"},
                        {"from": "gpt", "value": "Hi!"},
                    ]
                }
            ],
        ),
        ("a.jsonl", {"prompt": TWO[:1], "completion": TWO[1:2]}),
        (
            "a.jsonl",
            {
                "messages": [
                    turn(USER, [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]),
                    TWO[1],
                ]
            },
        ),
    ],
)
def test_records_of_all_usual_shapes_are_one_conversation(
    tmp_path: Path, name: str, record: Any
) -> None:
    dataset = read(tmp_path, "plain", record, name=name)
    ((before, piece),) = said(dataset, "plain")
    assert before.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert piece == "Hi!<|im_end|>"


def test_an_array_over_many_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps([{"messages": TWO[:2]}] * 3, indent=2))
    assert len(read_dataset(path, tokenizer("plain"), 4096).samples) == 3


def test_prompt_and_completion_as_text_and_tokens_of_others(tmp_path: Path) -> None:
    dataset = read(tmp_path, "plain", {"prompt": "the quick ", "completion": "brown fox"})
    assert said(dataset, "plain") == [("the quick ", "brown fox")]
    dataset = read(tmp_path, "plain", {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]})
    (sample,) = dataset.samples
    assert (sample.input_ids, sample.loss_mask) == ((5, 6, 7), (0, 1, 1))


def test_odd_lines_are_left_out_and_counted_where_that_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps({"messages": TWO[:2]})
    picture = json.dumps({"messages": [turn(USER, [{"type": "image_url"}]), TWO[1]]})
    path.write_text("\n".join([good, '{"text": ""}', "not json", picture, good]))
    dataset = read_dataset(path, tokenizer("plain"), 4096, skip_bad_lines=True)
    assert len(dataset.samples) == 2
    assert sum(dataset.left_out.values()) == 3
    assert dataset.left_out["not JSON"] == dataset.left_out["content of the kind image_url"] == 1
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        read_dataset(path, tokenizer("plain"), 4096)


class Dressing:
    """A tokenizer that puts its beginning of sequence before a text, and knows no offsets."""

    eos_token_id = 1
    chat_template = None

    def __init__(self, style: str) -> None:
        self._inner = tokenizer(style)
        self.all_special_tokens = self._inner.all_special_tokens
        self.apply_chat_template = self._inner.apply_chat_template
        self.begin = self._inner.bos_token_id

    def __call__(self, text: str, add_special_tokens: bool = True, **more: Any) -> dict[str, Any]:
        if more.get("return_offsets_mapping"):
            raise NotImplementedError("a tokenizer in Python")
        ids = self._inner(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": [self.begin, *ids] if add_special_tokens else ids}


def test_the_beginning_of_sequence_comes_once_wherever_it_comes_from(tmp_path: Path) -> None:
    dressing = Dressing("headers")
    for name, text in (("a.jsonl", json.dumps({"text": "<s>the fox"})), ("a.txt", "the fox " * 9)):
        (tmp_path / name).write_text(text)
        for sample in read_dataset(tmp_path / name, dressing, 16).samples:
            assert sample.input_ids[0] == dressing.begin
            assert sample.input_ids.count(dressing.begin) == 1
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": TWO}))
    (sample,) = read_dataset(tmp_path / "c.jsonl", dressing, 4096).samples
    assert sample.input_ids.count(dressing.begin) == 1
    fast = read_dataset(tmp_path / "c.jsonl", tokenizer("headers"), 4096).samples[0]
    assert (sample.input_ids, sample.loss_mask) == (fast.input_ids, fast.loss_mask)


words = st.text(st.characters(codec="utf-8", exclude_characters="<>|\x00"), min_size=1, max_size=20)
plain_words = words.map(str.strip).filter(bool)


@pytest.mark.parametrize("style", ["plain", "headers", "ended"])
@settings(max_examples=50, deadline=None)
@given(turns=st.lists(st.tuples(plain_words, plain_words), min_size=1, max_size=4))
def test_masks_are_those_of_an_independent_truth(
    tmp_path_factory: pytest.TempPathFactory, style: str, turns: list[tuple[str, str]]
) -> None:
    """Built from bytes: the tokens of the answers, put together, are the answers' own bytes."""
    messages = [
        turn(role, text) for pair in turns for role, text in zip((USER, SAYS), pair, strict=True)
    ]
    dataset = read(tmp_path_factory.mktemp("a"), style, {"messages": messages})
    stop = {"plain": "<|im_end|>", "headers": "<|eot|>", "ended": "<|end|>"}[style]
    wanted = "".join(answer + stop for _, answer in turns)
    ids = [
        token
        for sample in dataset.samples
        for token, on in zip(sample.input_ids, sample.loss_mask, strict=True)
        if on
    ]
    assert tokenizer(style).decode(ids, clean_up_tokenization_spaces=False) == wanted


def test_a_called_function_has_its_arguments_as_an_object() -> None:
    called = {"from": "function_call", "value": '{"name": "f", "arguments": "{\\"x\\": 1}"}'}
    (call,) = records._message("line 1", called)["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": None, "from": "human", "content": None, "value": "Hello"}, TWO[1]]},
        {"messages": [turn("User", "Hello"), turn("Assistant", "Hi!")]},
        {"messages": json.dumps(TWO[:2])},
        {"messages": [turn(USER, [{"type": "input_text", "text": "Hello"}]), TWO[1]]},
        {"messages": [TWO[0], turn(SAYS, [{"type": "output_text", "text": "Hi!"}])]},
    ],
)
def test_odd_forms_of_one_conversation(tmp_path: Path, record: Any) -> None:
    ((before, piece),) = said(read(tmp_path, "plain", record), "plain")
    assert before.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert piece == "Hi!<|im_end|>"


def test_calls_of_the_older_form_and_results_that_are_objects() -> None:
    called = {"role": "assistant", "content": None, "function_call": {"name": "f"}}
    assert records._message("line 1", called)["tool_calls"][0]["function"] == {"name": "f"}
    result = records._message("line 1", {"role": "ipython", "content": {"a": 1}})
    assert (result["role"], result["content"]) == ("tool", '{"a": 1}')
    silent = {"role": "assistant", "content": None, "reasoning_content": "hm"}
    assert records._message("line 1", silent)["content"] == ""
