"""Conversations to text by a chat template, and which of it the assistant says.

What counts is what is seen when the draft is used: a turn's prompt is the history as the template
renders it with a generation prompt, and its answer is what follows up to the stop token. Where the
rendering of each turn is a prefix of the whole, the conversation is one sample. Templates that
render a past turn otherwise than a present one (thinking is left out of the history, a system
message moves) give a sample for each turn, as it is served.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer_client.data.files import BadLine
from trainer_client.data.records import Chat

#: Settings of generation prompts that templates know for answers without thinking.
_VARIANTS: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"thinking": False})


@dataclass(frozen=True)
class Spans:
    """A text, and the ``[begin, end)`` of its characters that the assistant says."""

    text: str
    said: tuple[tuple[int, int], ...]


class Renderer:
    """One tokenizer's chat template. ``loss_on`` is ``all`` assistant turns or the ``last``."""

    def __init__(
        self, tokenizer: Any, *, loss_on: str = "all", options: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._loss_on = loss_on
        self._options = dict(options or {})
        self._tail: tuple[str, str] | None = None

    def samples(self, origin: str, chat: Chat) -> list[Spans]:
        """The samples of a conversation. Raises :class:`BadLine` where the template refuses it."""
        turns = [
            index
            for index, message in enumerate(chat.messages)
            if message["role"] == "assistant" and chat.weights[index]
        ]
        if self._loss_on == "last":
            turns = turns[-1:]
        if not turns:
            raise BadLine(f"{origin} has no assistant turn with loss", "no turn with loss")
        served = [self._served(origin, chat, index) for index in turns]
        whole = self._render(origin, chat.messages, chat.tools)
        if all(whole.startswith(each.text[: each.said[-1][1]]) for each in served):
            return [Spans(whole, tuple(each.said[-1] for each in served))]
        return served

    def _served(self, origin: str, chat: Chat, index: int) -> Spans:
        """The turn at ``index`` with the history before it, as it is served."""
        before, message = chat.messages[:index], chat.messages[index]
        text = self._render(origin, chat.messages[: index + 1], chat.tools)
        prompts = list(self._prompts(before, chat.tools))
        fitting = [prompt for prompt in prompts if text.startswith(prompt)]
        if fitting:
            begin = max(map(len, fitting))
        elif prompts and before:
            text, begin = self._joined(prompts, message)
        else:  # the template refuses a generation prompt here: the answer is where its words are
            begin = text.rfind(message["content"].strip())
            if begin <= 0:
                said = f"{origin}: the chat template does not show where message {index + 1} begins"
                raise BadLine(said, "an answer that is not found")
        return Spans(text, ((begin, self._end(text, begin)),))

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

    def _joined(self, prompts: Sequence[str], message: Mapping[str, Any]) -> tuple[str, int]:
        """A prompt and what is said after it, where the template's history leaves parts of it out.

        Of what the prompt supplies already (an opened thought) the answer's copy is left out.
        """
        answer, stop = message["content"], self._ending()[0]
        overlaps = [(_overlap(prompt, answer), prompt) for prompt in prompts]
        overlap, prompt = max(overlaps, key=lambda each: each[0])
        return prompt + answer[overlap:] + stop, len(prompt)

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
        words = "What is said here"
        chat = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": words}]
        try:
            tail = self._apply(chat, None).rpartition(words)[2]
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
            return str(self._tokenizer.apply_chat_template(list(messages), tokenize=False, **known))
        except Exception:
            if all(message["role"] != "developer" for message in messages):
                raise
            as_system = [
                message | {"role": "system"} if message["role"] == "developer" else message
                for message in messages
            ]
            return str(self._tokenizer.apply_chat_template(as_system, tokenize=False, **known))


def _specials(tokenizer: Any) -> set[str]:
    """Tokens that are no text: marked as special, or added beside the vocabulary."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*getattr(tokenizer, "all_special_tokens", ()), *(token.content for token in added)}


def _overlap(prompt: str, answer: str) -> int:
    """Characters of the answer's beginning that the prompt ends with."""
    most = min(len(prompt), len(answer))
    return next((n for n in range(most, 0, -1) if prompt.endswith(answer[:n])), 0)
