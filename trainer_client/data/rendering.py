"""Conversations to text by a chat template, and which of it the assistant says.

What counts is what is seen when the draft is used: a turn's prompt is the history as the template
renders it with a generation prompt, and its answer is what follows up to the stop token. Where the
rendering of each turn is a prefix of the whole, the conversation is one sample. Templates that
render a past turn otherwise than a present one (thinking is left out of the history, a system
message moves) give a sample for each turn, as it is served.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer_client.data.files import BadLine
from trainer_client.data.prefixes import Prefixes, prefixes
from trainer_client.data.records import Chat

#: Settings of generation prompts that templates know for answers without thinking.
_VARIANTS: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"thinking": False})


@dataclass(frozen=True)
class Spans:
    """A text, and the ``[begin, end)`` of its characters that the assistant says."""

    text: str
    said: tuple[tuple[int, int], ...]


#: Words that no conversation has, to see where a template puts an answer's.
_WORDS = "What is said here"


class Renderer:
    """One tokenizer's chat template. ``loss_on`` is ``all`` assistant turns or the ``last``."""

    def __init__(
        self, tokenizer: Any, *, loss_on: str = "all", options: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._loss_on = loss_on
        self._options = dict(options or {})
        self._tail: tuple[str, str] | None = None
        self._given = self._options.pop("chat_template", None)
        self._template = self._given or getattr(tokenizer, "chat_template", None)
        if isinstance(self._template, dict):
            self._template = self._template.get("default")
        self._marked = bool(re.search(r"{%-?\s*generation\b", self._template or ""))

    def samples(
        self, origin: str, chat: Chat, too_long: Callable[[str], bool] = lambda prompt: False
    ) -> list[Spans]:
        """The samples of a conversation. Raises :class:`BadLine` where the template refuses it.

        Turns whose prompt is ``too_long`` are not rendered one by one: a conversation costs what
        is kept of it, not the square of its turns.
        """
        turns = [
            index
            for index, message in enumerate(chat.messages)
            if message["role"] == "assistant" and chat.weights[index]
        ]
        if self._loss_on == "last":
            turns = turns[-1:]
        if not turns:
            raise BadLine(f"{origin} has no assistant turn with loss", "no turn with loss")
        if self._marked and (marked := self._by_marks(origin, chat, turns)):
            return [marked]
        whole = self._render(origin, chat.messages, chat.tools)
        every = self._prefixes(chat, whole) if len(turns) > 1 else None
        served = []
        for index in turns:
            served.append(self._served(origin, chat, index, every))
            if too_long(served[-1].text[: served[-1].said[0][0]]):
                break
        if all(whole.startswith(each.text[: each.said[-1][1]]) for each in served):
            return [Spans(whole, tuple(each.said[-1] for each in served))]
        return served

    def _by_marks(self, origin: str, chat: Chat, turns: Sequence[int]) -> Spans | None:
        """What the template itself marks as the assistant's (``{% generation %}``)."""
        from transformers.utils.chat_template_utils import render_jinja_template

        names = getattr(self._tokenizer, "special_tokens_map", {})
        options = {**names, **self._options, "return_assistant_tokens_mask": True}
        try:
            rendered: Any = render_jinja_template(
                [list(chat.messages)], chat.tools, chat_template=self._template, **options
            )
            (text,), (marks,) = rendered
        except Exception as error:
            said = f"{origin}: the chat template does not take this: {error}"
            raise BadLine(said, "refused by the chat template") from None
        every = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if len(marks) != len(every):
            return None
        told = [span for index, span in zip(every, marks, strict=True) if index in turns]
        kept = tuple((begin, end) for begin, end in told if begin < end)
        return Spans(sound(origin, text), kept) if kept else None

    def _prefixes(self, chat: Chat, whole: str) -> Prefixes | None:
        """All beginnings of a conversation at once, where the template permits it."""
        names = getattr(self._tokenizer, "special_tokens_map", {})
        known = {**names, **self._options} | ({"tools": chat.tools} if chat.tools else {})
        found = prefixes(self._template, chat.messages, known, _VARIANTS)
        return found if found is not None and found.whole == whole else None

    def _served(self, origin: str, chat: Chat, index: int, every: Prefixes | None) -> Spans:
        """The turn at ``index`` with the history before it, as it is served."""
        before, message = chat.messages[:index], chat.messages[index]
        if every is not None:
            text, prompts = every.text(index + 1), every.prompts(index)
        else:
            text = self._render(origin, chat.messages[: index + 1], chat.tools)
            prompts = list(self._prompts(before, chat.tools))
        fitting = [prompt for prompt in prompts if text.startswith(prompt)]
        if fitting:
            begin = max(map(len, fitting))
        elif prompts and before:
            text, begin = self._joined(prompts, text, message)
        else:  # the template refuses a generation prompt here: the answer is where its words are
            begin = self._where_words_are(text, chat, index)
            if begin <= 0:
                said = f"{origin}: the chat template does not show where message {index + 1} begins"
                raise BadLine(said, "an answer that is not found")
        return Spans(sound(origin, text), ((begin, self._end(text, begin)),))

    def _where_words_are(self, text: str, chat: Chat, index: int) -> int:
        """Where the answer begins, found by giving other words in its place; 0: not found."""
        other = chat.messages[index] | {"content": _WORDS}
        try:
            told = self._apply([*chat.messages[:index], other], chat.tools)
        except Exception:
            return 0
        begin = told.rfind(_WORDS)
        return begin if begin > 0 and text.startswith(told[:begin]) else 0

    def _prompts(self, before: Sequence[Any], tools: Any) -> Iterator[str]:
        """Ways in which the turn's prompt may be rendered, the usual one first."""
        seen = set()
        for variant in _VARIANTS:
            try:
                prompt = self._apply(before, tools, add_generation_prompt=True, **variant)
            except Exception:  # a template may refuse a history that ends so
                continue
            if prompt not in seen:
                seen.add(prompt)
                yield prompt

    def _joined(
        self, prompts: Sequence[str], text: str, message: Mapping[str, Any]
    ) -> tuple[str, int]:
        """A prompt and what is said after it, where the template's history leaves parts of it out.

        What is said is the thought, where the history leaves it out, and what the template writes
        of the rest (words, calls, stop token). What the prompt supplies already (an opened thought)
        is left out of the answer.
        """
        prompt = max(prompts, key=lambda each: _common(each, text))
        at = _common(prompt, text)
        rest, opened = text[at:], prompt[at:]
        thought, content = _thought(message), message["content"]
        shown = thought in rest and ("</think>" in rest or "</think>" not in content)
        if thought and not shown:
            closing = opened.strip().replace("<", "</", 1) if "<" in opened else "</think>"
            head, mark, said = content.rpartition("</think>")
            before = head + mark + said[: len(said) - len(said.lstrip())]
            if not mark:
                before = f"{opened}{thought}\n{closing}\n\n"
            rest = before + rest.lstrip()
        elif thought:  # the template opens it otherwise than the prompt does
            opened = opened.strip()
            rest = rest[rest.find(opened) + len(opened) :].lstrip() if opened in rest else rest
        overlap = _overlap(prompt, rest)
        return prompt + rest[overlap:], len(prompt)

    def _end(self, text: str, begin: int) -> int:
        """Where an answer ends: with its stop token, and not with what a template puts behind."""
        junk, end = self._ending()[1], len(text)
        return end - len(junk) if text.endswith(junk) and end - len(junk) > begin else end

    def _ending(self) -> tuple[str, str]:
        """What follows every answer: up to the stop token, and behind it."""
        if self._tail is None:
            self._tail = self._find_ending()
        return self._tail

    def _find_ending(self) -> tuple[str, str]:
        chat = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": _WORDS}]
        try:
            tail = self._apply(chat, None).rpartition(_WORDS)[2]
        except Exception:  # it wants other conversations than this one
            return "", ""
        special = sorted(map(str, _specials(self._tokenizer)), key=len, reverse=True)
        found = re.search("|".join(map(re.escape, special)), tail) if special else None
        if found is None:
            return tail.rstrip(), tail[len(tail.rstrip()) :]
        return tail[: found.end()], tail[found.end() :]

    def _render(self, origin: str, messages: Sequence[Any], tools: Any) -> str:
        try:
            return self._apply(messages, tools)
        except Exception as error:  # jinja's errors, and what templates raise on purpose
            said = f"{origin}: the chat template does not take this: {error}"
            raise BadLine(said, "refused by the chat template") from None

    def _apply(self, messages: Sequence[Any], tools: Any, **options: Any) -> str:
        known = self._options | options | ({"tools": tools} if tools else {})
        try:
            return self._tokenizer_text(messages, known)
        except Exception:
            if all(message["role"] != "developer" for message in messages):
                raise
            as_system = [
                message | {"role": "system"} if message["role"] == "developer" else message
                for message in messages
            ]
            return self._tokenizer_text(as_system, known)

    def _tokenizer_text(self, messages: Sequence[Any], known: Mapping[str, Any]) -> str:
        given = {"chat_template": self._given} if self._given else {}
        options = {**given, **known}
        return str(self._tokenizer.apply_chat_template(list(messages), tokenize=False, **options))


def sound(origin: str, text: str) -> str:
    """The text, which a tokenizer can take. Raises :class:`BadLine` for half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        said = f"{origin} has {half}, half of a surrogate pair; repair the text"
        raise BadLine(said, "half of a surrogate pair") from None
    return text


def _thought(message: Mapping[str, Any]) -> str:
    """What a turn thinks before it speaks, without the marks around it; empty where it does not."""
    for name in ("reasoning_content", "reasoning", "thinking"):
        if message.get(name):
            return str(message[name]).strip()
    head, mark, _ = message["content"].rpartition("</think>")
    return head.rpartition("<think>")[2].strip() if mark else ""


def _common(prompt: str, text: str) -> int:
    """Characters that both begin with, to the last whole mark (``<...>``)."""
    pairs = enumerate(zip(prompt, text, strict=False))
    shared = next((at for at, (one, other) in pairs if one != other), min(len(prompt), len(text)))
    mark = prompt.rfind("<", 0, shared)
    return mark if mark >= 0 and ">" not in prompt[mark:shared] else shared


def _specials(tokenizer: Any) -> set[str]:
    """Tokens that are no text: marked as special, or added beside the vocabulary."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*getattr(tokenizer, "all_special_tokens", ()), *(token.content for token in added)}


def _overlap(prompt: str, answer: str) -> int:
    """Characters of the answer's beginning that the prompt ends with."""
    most = min(len(prompt), len(answer))
    return next((n for n in range(most, 0, -1) if prompt.endswith(answer[:n])), 0)
