"""Chat templates in the style of twelve families, each with the truth of it in plain Python.

``truth`` knows nothing of templates or offsets: it says what a server's prompt for a turn is, and
what the model answers, as text.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Turn = dict[str, Any]


@dataclass(frozen=True)
class Style:
    """A family: its template, what it takes, and ``(prompt, answer)`` of the turn at an index."""

    template: str
    truth: Callable[[list[Turn], int, list[Any] | None], tuple[str, str]]
    system: bool = True
    tools: bool = False
    thinks: bool = False


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _thought(m: Turn) -> tuple[str, str]:
    head, mark, rest = m["content"].partition("</think>")
    return (head.removeprefix("<think>").strip("\n"), rest.lstrip("\n")) if mark else ("", head)


def _calls(m: Turn) -> str:
    return "".join(f"<call>{_json(call['function'])}</call>" for call in m.get("tool_calls", ()))


_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '<call>' + (c.function | tojson) + '</call>' }}"
    "{% endfor %}"
)
_TOOLS = "{% if tools %}{{ '<|tools|>' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|end|>' }}{% endif %}"  # noqa: E501


def _tools(tools: list[Any] | None) -> str:
    return "<|tools|>" + "".join(map(_json, tools)) + "<|end|>" if tools else ""


def _simple(
    begin: str,
    head: Callable[[str], str],
    stop: str,
    *,
    behind: str = "",
    default: str = "",
    trim: bool = False,
    tools: bool = False,
) -> Callable[[list[Turn], int, list[Any] | None], tuple[str, str]]:
    """Families whose turns all look alike."""

    def truth(messages: list[Turn], index: int, given: list[Any] | None) -> tuple[str, str]:
        def content(m: Turn) -> str:
            said = m["content"].strip() if trim else m["content"]
            return said + (_calls(m) if tools else "")

        prompt = begin + (_tools(given) if tools else "")
        if messages[0]["role"] != "system":
            prompt += default
        for m in messages[:index]:
            prompt += head(m["role"]) + content(m) + stop + behind
        return prompt + head("assistant"), content(messages[index]) + stop

    return truth


def _im(role: str) -> str:
    return f"<|im_start|>{role}\n"


def _thinking(
    head: str, opened: str, empty: str, stop: str, behind: str, other: Callable[[Turn], str]
) -> Callable[[list[Turn], int, list[Any] | None], tuple[str, str]]:
    """Families that leave thoughts out of the history."""

    def truth(messages: list[Turn], index: int, given: list[Any] | None) -> tuple[str, str]:
        prompt = _tools(given)
        for m in messages[:index]:
            if m["role"] == "assistant":
                prompt += head + _thought(m)[1] + _calls(m) + stop + behind
            else:
                prompt += other(m)
        m = messages[index]
        thought, said = _thought(m)
        prompt += head + opened
        if not thought:
            return prompt + empty, said + _calls(m) + stop
        open_ = "" if opened else "<think>\n"
        return prompt, f"{open_}{thought}\n</think>\n\n{said}{_calls(m)}{stop}"

    return truth


def _qwen3(empty: str, opened: str = "") -> Style:
    last = (
        "{% if loop.last %}{{ '<think>\n' + r + '\n</think>\n\n' if r else EMPTY }}{% endif %}"
    ).replace("EMPTY", repr(empty))
    off = "{% if enable_thinking is defined and not enable_thinking %}{{ EMPTY }}{% else %}{{ OPENED }}{% endif %}"  # noqa: E501
    off = off.replace("EMPTY", repr(empty)).replace("OPENED", repr(opened))
    template = (
        _TOOLS + "{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content %}"
        "{% set r = '' %}{% if '</think>' in c %}{% set r = c.split('</think>')[0]"
        ".split('<think>')[-1].strip('\n') %}{% set c = c.split('</think>')[-1].lstrip('\n') %}"
        "{% endif %}{{ '<|im_start|>assistant\n' }}"
        + last
        + "{{ c }}"
        + _CALLS
        + "{{ '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        + off
        + "{% endif %}"
    )

    def truth(messages: list[Turn], index: int, given: list[Any] | None) -> tuple[str, str]:
        other = lambda m: _im(m["role"]) + m["content"] + "<|im_end|>\n"  # noqa: E731
        thinks = bool(_thought(messages[index])[0])
        made = _thinking(
            _im("assistant"), opened if thinks else "", empty, "<|im_end|>", "\n", other
        )
        return made(messages, index, given)

    return Style(template, truth, tools=True, thinks=True)


def _harmony() -> Style:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|start|>assistant' }}"
        "{{ '<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last and not "
        "add_generation_prompt else '<|end|>') }}{% else %}{{ '<|start|>' + m.role + "
        "'<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    )

    def truth(messages: list[Turn], index: int, given: list[Any] | None) -> tuple[str, str]:
        prompt = ""
        for m in messages[:index]:
            channel = "<|channel|>final" if m["role"] == "assistant" else ""
            prompt += f"<|start|>{m['role']}{channel}<|message|>{m['content']}<|end|>"
        said = messages[index]["content"]
        return prompt + "<|start|>assistant", f"<|channel|>final<|message|>{said}<|return|>"

    return Style(template, truth)


def _inst() -> Style:
    """The system message goes into the last user turn, so that each turn's prompt is its own."""
    template = (
        "{{ bos_token }}{% set ns = namespace(sys='', last=0) %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.sys = m.content + '\n\n' %}"
        "{% elif m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + (ns.sys if loop.index0 == "
        "ns.last else '') + m.content + '[/INST]' }}{% elif m.role == 'assistant' %}"
        "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )

    def truth(messages: list[Turn], index: int, given: list[Any] | None) -> tuple[str, str]:
        system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
        users = [i for i, m in enumerate(messages[:index]) if m["role"] == "user"]
        prompt = "<s>"
        for i, m in enumerate(messages[:index]):
            if m["role"] == "user":
                prompt += f"[INST]{system if i == users[-1] else ''}{m['content']}[/INST]"
            elif m["role"] == "assistant":
                prompt += f" {m['content']}</s>"
        return prompt, f" {messages[index]['content']}</s>"

    return Style(template, truth)


def _turns(begin: str, turn: str, generate: str, end: str = "") -> str:
    ended = "{% else %}{{ " + repr(end) + " }}" if end else ""
    return (
        f"{{{{ {begin!r} }}}}{{% for m in messages %}}{turn}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {generate!r} }}}}{ended}{{% endif %}}"
    )


_BARS = "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
_HEAD = "{{ '<|head|>' + m.role + '<|/head|>\n\n' + (m.content | trim) + '<|eot|>' }}"
_GEMMA = (
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
    "(m.content | trim) + '<end_of_turn>\n' }}"
)
_IM = "{{ '<|im_start|>' + m.role + '\n' + m.content }}" + _CALLS + "{{ '<|im_end|>\n' }}"
_NO_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}"
)
_DEFAULT = "<|im_start|>system\nHelp.<|im_end|>\n"
_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' + "
    "m.content.split('</think>')[-1].lstrip('\n') }}" + _CALLS + "{{ '</s>' }}{% else %}"
    "{{ '<|' + m.role + '|>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)


def _r1(messages: list[Turn], index: int, given: list[Any] | None) -> tuple[str, str]:
    other = lambda m: f"<|{m['role']}|>{m['content']}"  # noqa: E731
    made = _thinking("<|assistant|>", "<think>\n", "", "</s>", "", other)
    prompt, answer = made(messages, index, None)
    return "<s>" + prompt, answer


STYLES = {
    "chatml": Style(
        _NO_SYSTEM + _TOOLS + _turns("", _IM, "<|im_start|>assistant\n"),
        lambda m, i, t: (lambda p, a: ((_DEFAULT if m[0]["role"] != "system" else "") + p, a))(
            *_simple("", _im, "<|im_end|>", behind="\n", tools=True)(m, i, t)
        ),
        tools=True,
    ),
    "smollm": Style(
        _NO_SYSTEM + _turns("", _IM, "<|im_start|>assistant\n"),
        _simple("", _im, "<|im_end|>", behind="\n", default=_DEFAULT),
    ),
    "llama3": Style(
        _turns("<s>", _HEAD, "<|head|>assistant<|/head|>\n\n"),
        _simple("<s>", lambda r: f"<|head|>{r}<|/head|>\n\n", "<|eot|>", trim=True),
    ),
    "phi3": Style(
        _turns("", _BARS, "<|assistant|>\n", "</s>"),
        _simple("", lambda r: f"<|{r}|>\n", "<|end|>", behind="\n"),
    ),
    "phi4": Style(
        _turns(
            "",
            "{{ '<|im_start|>' + m.role + '<|sep|>' + m.content + '<|im_end|>' }}",
            "<|im_start|>assistant<|sep|>",
        ),
        _simple("", lambda r: f"<|im_start|>{r}<|sep|>", "<|im_end|>"),
    ),
    "granite": Style(
        _turns(
            "",
            "{{ '<|head|>' + m.role + '<|/head|>' + m.content + '</s>\n' }}",
            "<|head|>assistant<|/head|>",
        ),
        _simple("", lambda r: f"<|head|>{r}<|/head|>", "</s>", behind="\n"),
    ),
    "gemma": Style(
        _turns("<s>", _GEMMA, "<start_of_turn>model\n"),
        _simple(
            "<s>",
            lambda r: f"<start_of_turn>{'model' if r == 'assistant' else r}\n",
            "<end_of_turn>",
            behind="\n",
            trim=True,
        ),
    ),
    "mistral": _inst(),
    "harmony": _harmony(),
    "qwen3": _qwen3("<think>\n\n</think>\n\n"),
    "qwen3.5": _qwen3("<think>\n\n</think>\n\n", "<think>\n"),
    "nemotron": _qwen3("<think></think>", "<think>\n"),
    "deepseek": Style(_R1, _r1, tools=False, thinks=True),
}


@functools.cache
def tokenizer(style: str) -> Any:
    """A byte-level tokenizer that merges white space, as real ones do."""
    marks = re.findall(r"<\|[a-z_/]+\|>|<(?:start|end)_of_turn>|\[/?INST\]", STYLES[style].template)
    special = sorted({*marks, "<s>", "</s>", "<|user|>", "<|system|>", "<|tool|>"})
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        ["the quick brown fox\n\n\n says  hello\n to\n\n the   lazy dog \n\n\n\n"] * 9,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=special,
            show_progress=False,
        ),
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    wrapped.add_special_tokens({"additional_special_tokens": special})
    wrapped.chat_template = STYLES[style].template
    return wrapped
