"""Records of all usual shapes, made one of three: a text, a conversation, or tokens.

``text``, with ``loss_spans`` where it is formatted already; ``messages`` (OpenAI's),
``conversations`` (ShareGPT's); ``prompt`` and ``completion``; ``input_ids`` with a ``loss_mask`` or
``labels``. A column that is null is as if absent.
"""

from __future__ import annotations

import json
import math
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
    "ipython": "tool",
    "function": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
#: Roles whose content is a call, as JSON.
_CALLING = ("function_call", "tool_call")
#: What a turn thinks before it speaks, by the names that are in use.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_SHAPES = ("text", "messages", "conversations", "prompt", "input_ids")


@dataclass(frozen=True)
class Text:
    """Text with loss everywhere, or on the ``[begin, end)`` of its characters in ``said``."""

    text: str
    said: tuple[tuple[int, int], ...] | None = None


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


def understand(record: Record, *, may_lack_answers: bool = False) -> Text | Tokens | Chat:
    """What a record is. Raises :class:`BadLine` that says what is wrong, and where.

    With ``may_lack_answers`` a prompt alone, or a conversation that nobody answers, is one too.
    """
    value, origin = record.value, record.origin
    if isinstance(value, str):
        return Text(value)
    if isinstance(value, list) and value and all(map(_is_message, value)):
        value = {"messages": value}
    if not isinstance(value, dict):
        raise _wrong_shape(origin)
    row = {name: each for name, each in value.items() if each is not None}
    there = [name for name in _SHAPES if name in row]
    if may_lack_answers and there == ["prompt"] and isinstance(row["prompt"], str):
        row.setdefault("completion", "?")  # which is asked for
    if may_lack_answers and there == ["prompt"] and isinstance(row["prompt"], list):
        there, row["messages"] = ["messages"], row["prompt"]
    if "completion" not in row and "prompt" in there:
        there.remove("prompt")  # of data that keeps a conversation's first words beside it
    if len(there) != 1:
        raise _wrong_shape(origin)
    if there == ["text"]:
        return _formatted(origin, row)
    if there == ["input_ids"]:
        return _tokens(origin, row)
    if there == ["prompt"]:
        return _prompt(origin, row)
    said = _rows(row[there[0]])
    if isinstance(said, str):  # as columns of tables have it
        said = _from_json(said, said)
    if isinstance(row.get("system"), str) and isinstance(said, list) and said:
        first = said[0] if isinstance(said[0], dict) else {}
        if row["system"] and first.get("role", first.get("from")) != "system":
            said = [{"role": "system", "content": row["system"]}, *said]
    return _chat(origin, said, row.get("tools"), may_lack_answers=may_lack_answers)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _rows(columns: Any) -> Any:
    """A list of objects, also where a table has it as columns (``{"role": [...], ...}``)."""
    if not isinstance(columns, dict) or not all(isinstance(c, list) for c in columns.values()):
        return columns
    if len({len(column) for column in columns.values()}) != 1:
        return columns
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


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
    return value


def _formatted(origin: str, row: Mapping[str, Any]) -> Text:
    """Text, and where ``loss_spans`` (``[[begin, end], ...]``) say that it has loss."""
    text, spans = _text(origin, "text", row["text"]), row.get("loss_spans")
    if spans is None:
        return Text(text)
    at, said = 0, []
    span: Any
    for span in spans if isinstance(spans, list) else [None]:
        whole = isinstance(span, list) and [type(each) for each in span] == [int, int]
        if not whole or not at <= span[0] < span[1] <= len(text):
            wants = f"ascending [begin, end) within its {len(text)} characters"
            raise BadLine(f'{origin}: "loss_spans" must be {wants}', "loss_spans are no spans")
        at = span[1]
        said.append((span[0], span[1]))
    return Text(text, tuple(said))


def _tokens(origin: str, row: Mapping[str, Any]) -> Tokens:
    ids: Any = row["input_ids"]
    mask: Any = row.get("loss_mask")
    if mask is None and isinstance(labels := row.get("labels"), list):
        mask = [int(label != -100) for label in labels]  # what torch's cross entropy leaves out
    if mask is None and isinstance(ids, list):
        mask = [1] * len(ids)
    for name, values in (("input_ids", ids), ("loss_mask", mask)):
        whole = isinstance(values, list) and all(
            isinstance(each, int) and 0 <= each < 1 << 31 for each in values
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
    if isinstance(prompt, list) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat(origin, [*prompt, *completion], row.get("tools"), loss_from=len(prompt))
    prompt = _text(origin, "prompt", prompt)
    text = prompt + _text(origin, "completion", completion)
    return Text(text, ((len(prompt), len(text)),))


def _chat(
    origin: str, said: Any, tools: Any, *, loss_from: int = 0, may_lack_answers: bool = False
) -> Chat:
    if not isinstance(said, list) or not said:
        raise BadLine(
            f'{origin}: "messages" must be a list that is not empty', "messages are no list"
        )
    messages, weights = [], []
    for number, message in enumerate(said, start=1):
        where = f"{origin}: message {number}"
        messages.append(_message(where, message))
        weights.append(_weight(where, message) if number > loss_from else 0.0)
    silent = all(message["role"] != "assistant" for message in messages)
    if silent and not may_lack_answers:
        said = f"{origin} has no assistant turn, so there is nothing to learn from"
        raise BadLine(said, "no assistant turn")
    return Chat(messages, _listed(f"{origin}: its tools", "tools", tools) or None, weights)


def _weight(where: str, message: Mapping[str, Any]) -> float:
    said = message.get("weight")
    try:
        weight = float(1 if said is None else said)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise BadLine(f"{where} has the weight {said!r}; 0 or 1 is wanted", "a weight")
    return weight


def _listed(where: str, name: str, value: Any) -> list[Any]:
    """A list of objects, also where it comes as JSON in a string, as columns of tables have it."""
    if isinstance(value, str):
        value = _from_json(value, value) if value.strip() else []
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise BadLine(f"{where} are no list of objects", f"{name} are no list of objects")
    return value


def _from_json(text: str, otherwise: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return otherwise


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadLine(f"{where} is not an object", "a message is no object")
    message = {name: each for name, each in message.items() if each is not None}
    given = message.get("role", message.get("from"))
    given = given.lower() if isinstance(given, str) else given
    role = _SAID_AS.get(given, given)
    if role not in ROLES:
        said = f"{where} has the role {role!r}; roles are {', '.join(ROLES)}"
        raise BadLine(said, f"the role {role!r}"[:60])
    kept = dict(message)
    for name in ("from", "value", "weight", "function_call"):
        kept.pop(name, None)
    calls = [_call(each) for each in _listed(where, "tool_calls", message.get("tool_calls"))]
    if isinstance(message.get("function_call"), dict) and not calls:
        calls = [_call({"type": "function", "function": message["function_call"]})]
    if role == "tool" and isinstance(message.get("content"), dict):
        message["content"] = json.dumps(message["content"], ensure_ascii=False)
    thinks = role == "assistant" and any(name in message for name in _THOUGHTS)
    content = _content(where, message, may_be_absent=bool(calls) or thinks)
    if given in _CALLING and isinstance(called := _from_json(content, None), dict):
        calls, content = [_call({"type": "function", "function": called})], ""
    kept.pop("tool_calls", None)
    for name in (*_THOUGHTS, "name"):
        if name in kept and not isinstance(kept[name], str):
            raise BadLine(f'{where} has a "{name}" that is no string', f"{name} is no string")
    return kept | {"role": role, "content": content} | ({"tool_calls": calls} if calls else {})


def _content(where: str, message: Mapping[str, Any], *, may_be_absent: bool) -> str:
    content = message.get("content", message.get("value"))
    if content is None and may_be_absent:
        return ""
    if isinstance(content, list):
        content = "".join(_part(where, part) for part in content)
    if not isinstance(content, str):
        raise BadLine(f"{where} has no content that is a string", "no content")
    return content


def _part(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind not in ("text", "input_text", "output_text"):
        said = f"{where} has content of the kind {kind}; only text is trained on"
        raise BadLine(said, f"content of the kind {kind}"[:60])
    if not isinstance(part.get("text"), str):
        raise BadLine(f"{where} has a part without text", "a part without text")
    return str(part["text"])


def _call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool call as templates take it: arguments as an object, not as JSON in a string."""
    if not isinstance(call.get("function"), dict):
        return call
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        function["arguments"] = _from_json(function["arguments"], function["arguments"])
    return {**call, "function": function}
