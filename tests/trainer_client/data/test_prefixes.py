"""Long conversations are not rendered anew for each turn, and give what they gave."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.trainer_client.data.styles import STYLES, tokenizer
from tests.trainer_client.data.test_masks import conversation
from trainer_client.data import rendering
from trainer_client.data.files import BadLine
from trainer_client.data.prefixes import prefixes
from trainer_client.data.records import Chat
from trainer_client.data.rendering import Renderer

PERMITTING = ["chatml", "smollm", "llama3", "phi3", "phi4", "granite", "gemma", "deepseek"]
#: A template's loop over the messages, and why it must be rendered turn by turn.
LOOKING_AHEAD = [
    "{% for m in messages %}{{ m.content }}{% if loop.last %}!{% endif %}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{{ loop['last'] }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{{ loop.nextitem }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{{ messages | length }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{{ messages[-1].role }}{% endfor %}",
    "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = 1 %}{% endfor %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% set n = namespace(x=0) %}{% for m in messages %}{{ m.content }}{% set n.x = n.x + 1 %}"
    "{% endfor %}{{ n.x }}",
    "{% for m in messages if m.content %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{% if add_generation_prompt %}?{% endif %}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{% if loop.index == 1 %}{% break %}{% endif %}"
    "{% endfor %}",
    "{{ messages[0].content }}{{ messages[1:] }}",
]


def rendered(style: str, chat: Chat) -> Any:
    try:
        return Renderer(tokenizer(style)).samples("a:1", chat)
    except BadLine as error:
        return str(error)


@pytest.mark.parametrize("style", PERMITTING)
def test_what_is_rendered_at_once_is_what_turns_give(
    style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(style)
    chats = []
    for _ in range(40):
        messages, tools = conversation(style, chance)
        chats.append(Chat(messages, tools, [1.0] * len(messages)))
    at_once = [rendered(style, chat) for chat in chats]
    monkeypatch.setattr(rendering, "prefixes", lambda *_: None)
    assert at_once == [rendered(style, chat) for chat in chats]


@pytest.mark.parametrize("style", ["chatml", "llama3"])
def test_a_conversation_is_rendered_as_often_whatever_its_turns(
    style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for turns in (3, 60):
        renderer = Renderer(tokenizer(style))
        applied: list[int] = []
        whole = renderer._tokenizer_text
        monkeypatch.setattr(
            renderer, "_tokenizer_text", lambda *a, w=whole, s=applied: s.append(1) or w(*a)
        )
        messages = [{"role": role, "content": "x"} for role in ("user", "assistant") * turns]
        (sample,) = renderer.samples("a:1", Chat(messages, None, [1.0] * len(messages)))
        assert len(sample.said) == turns
        counts.append(len(applied))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("template", LOOKING_AHEAD)
def test_templates_that_look_ahead_are_seen(template: str) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert prefixes(template, messages, {}, [{}]) is None


def test_text_with_the_mark_itself_is_rendered_turn_by_turn() -> None:
    template = STYLES["chatml"].template
    messages = [{"role": "user", "content": "\ue000\uf8ff\ue000"}]
    assert prefixes(template, messages, {}, [{}]) is None
