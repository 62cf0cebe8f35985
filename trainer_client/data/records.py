"""Records of all usual shapes, made one of three: a text, a conversation, or tokens.

``text``; ``messages`` (OpenAI's), ``conversations`` (ShareGPT's); ``prompt`` and ``completion``;
``input_ids`` with a ``loss_mask``. A column that is null is as if absent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer_client.data.files import BadLine, Record

ROLES = ("system", "developer", "user", "assistant", "tool")
#: ShareGPT's names, and others'.
_SAID_AS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
}
_SHAPES = ("text", "messages", "conversations", "prompt", "input_ids")


@dataclass(frozen=True)
class Text:
    """Text with loss everywhere, or from the character ``loss_from`` on."""

    text: str
    loss_from: int = 0


@dataclass(frozen=True)
class Tokens:
    """Tokens that somebody else has made."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]


@dataclass(frozen=True)
class Chat:
    """A conversation as chat templates take it; ``weights`` has 0 for a turn without loss."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    weights: list[float] = field(default_factory=list)


def understand(record: Record) -> Text | Tokens | Chat:
    """What a record is. Raises :class:`BadLine` that says what is wrong, and where."""
    value, origin = record.value, record.origin
    if isinstance(value, str):
        return Text(value)
    if not isinstance(value, dict):
        raise _wrong_shape(origin)
    row = {name: each for name, each in value.items() if each is not None}
    there = [name for name in _SHAPES if name in row]
    if len(there) != 1:
        raise _wrong_shape(origin)
    if "text" in row:
        return Text(_text(origin, "text", row["text"]))
    if "input_ids" in row:
        return _tokens(origin, row)
    if "prompt" in row:
        return _prompt(origin, row)
    return _chat(origin, row.get("messages", row.get("conversations")), row.get("tools"))


def _wrong_shape(origin: str) -> BadLine:
    return BadLine(
        f'{origin} wants an object with either "text" or "messages" (or "conversations", "prompt" '
        'and "completion", "input_ids" and "loss_mask")',
        "neither text nor messages",
    )


def _text(origin: str, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        said = f'{origin}: "{name}" must be a string that is not empty'
        raise BadLine(said, f"{name} is no text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        said = f"{origin} has {half}, half of a surrogate pair; repair the text"
        raise BadLine(said, "half of a surrogate pair") from None
    return value


def _tokens(origin: str, row: Mapping[str, Any]) -> Tokens:
    ids: Any = row["input_ids"]
    mask: Any = row.get("loss_mask")
    if mask is None and isinstance(ids, list):
        mask = [1] * len(ids)
    for name, values in (("input_ids", ids), ("loss_mask", mask)):
        whole = isinstance(values, list) and all(
            isinstance(each, int) and each >= 0 for each in values
        )
        if not whole or not values:
            said = f'{origin}: "{name}" must be a list of whole numbers that is not empty'
            raise BadLine(said, f"{name} are no numbers")
    if len(ids) != len(mask):
        said = f"{origin} has {len(ids)} input_ids and {len(mask)} values in loss_mask"
        raise BadLine(said, "input_ids and loss_mask differ")
    return Tokens(tuple(ids), tuple(int(bool(each)) for each in mask))


def _prompt(origin: str, row: Mapping[str, Any]) -> Text | Chat:
    prompt, completion = row["prompt"], row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat(origin, [*prompt, *completion], row.get("tools"), loss_from=len(prompt))
    prompt = _text(origin, "prompt", prompt)
    return Text(prompt + _text(origin, "completion", completion), loss_from=len(prompt))


def _chat(origin: str, said: Any, tools: Any, loss_from: int = 0) -> Chat:
    if not isinstance(said, list) or not said:
        raise BadLine(
            f'{origin}: "messages" must be a list that is not empty', "messages are no list"
        )
    messages, weights = [], []
    for number, message in enumerate(said, start=1):
        messages.append(_message(f"{origin}: message {number}", message))
        weight = message.get("weight")
        weights.append(float(1 if weight is None else weight) if number > loss_from else 0.0)
    if all(message["role"] != "assistant" for message in messages):
        said = f"{origin} has no assistant turn, so there is nothing to learn from"
        raise BadLine(said, "no assistant turn")
    return Chat(messages, tools if isinstance(tools, list) and tools else None, weights)


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadLine(f"{where} is not an object", "a message is no object")
    role = message.get("role", message.get("from"))
    role = _SAID_AS.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        said = f"{where} has the role {role!r}; roles are {', '.join(ROLES)}"
        raise BadLine(said, f"the role {role!r}")
    kept = {name: each for name, each in message.items() if each is not None}
    for name in ("from", "value", "weight"):
        kept.pop(name, None)
    kept |= {"role": role, "content": _content(where, message)}
    if calls := kept.get("tool_calls"):
        kept["tool_calls"] = [_call(call) for call in calls] if isinstance(calls, list) else calls
    return kept


def _content(where: str, message: Mapping[str, Any]) -> str:
    content = message.get("content", message.get("value"))
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list):
        kinds = {part.get("type") if isinstance(part, dict) else "text" for part in content}
        if other := sorted(str(kind) for kind in kinds - {"text"}):
            said = f"{where} has content of the kind {', '.join(other)}; only text is trained on"
            raise BadLine(said, f"content of the kind {other[0]}")
        content = "".join(part if isinstance(part, str) else part["text"] for part in content)
    if not isinstance(content, str):
        raise BadLine(f"{where} has no content that is a string", "no content")
    return content


def _call(call: Any) -> Any:
    """A tool call as templates take it: arguments as an object, not as JSON in a string."""
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        return call
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except ValueError:
            return call
    return call | {"function": function}
