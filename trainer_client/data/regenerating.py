"""A data set with its answers replaced by a target's own: what a draft learns best from.

Each assistant turn of a conversation is asked for with the history before it, in which the turns
before are the target's already. A turn that calls tools stays as it is, without loss: the results
behind it answer its calls and no others. An answer that was cut is none, and ends its conversation.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer_client.data.contents import Contents
from trainer_client.data.endpoint import Endpoint, EndpointError
from trainer_client.data.files import BadLine, Record, read_records
from trainer_client.data.records import Chat, Text, understand
from trainer_client.errors import DataError


@dataclass(frozen=True)
class Sampling:
    """What the endpoint is asked with; None: its own default."""

    model: str
    max_tokens: int = 2048
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    #: further fields of each request
    extra: Mapping[str, Any] = field(default_factory=dict)

    def request(self, **content: Any) -> dict[str, Any]:
        """A request with this content."""
        said = {name: v for name, v in asdict(self).items() if v is not None and name != "extra"}
        return said | dict(self.extra) | content


@dataclass
class Outcome:
    """How many records came of it, and what was left out by reason."""

    written: int = 0
    before: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    completion_tokens: int = 0


def answered(endpoint: Endpoint, sampling: Sampling, record: Record) -> tuple[dict[str, Any], int]:
    """The record with the target's answers, and the tokens that these have.

    Raises :class:`BadLine` where none comes of it, and :class:`EndpointError`.
    """
    known = understand(record, may_lack_answers=True)
    if isinstance(known, Chat):
        return _conversation(endpoint, sampling, record.origin, known)
    if isinstance(known, Text) and known.said and known.said[-1][0]:
        prompt = known.text[: known.said[-1][0]]
        answer = endpoint.ask("completions", sampling.request(prompt=prompt))
        text = _whole(record.origin, answer["choices"][0]).get("text")
        if not isinstance(text, str) or not text:
            raise BadLine(f"{record.origin}: an empty answer", "an empty answer")
        return {"prompt": prompt, "completion": text}, _tokens(answer)
    raise BadLine(f"{record.origin} has no prompt that could be answered", "no prompt")


def _conversation(
    endpoint: Endpoint, sampling: Sampling, origin: str, chat: Chat
) -> tuple[dict[str, Any], int]:
    messages: list[dict[str, Any]] = []
    count, tokens = 0, 0
    turns = list(chat.messages)
    if turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant", "content": ""})
    for turn in turns:
        if turn["role"] != "assistant":
            messages.append(turn)
        elif turn.get("tool_calls"):
            messages.append(turn | {"weight": 0})
        else:
            content = {"messages": list(map(_as_history, messages))}
            given = content | ({"tools": chat.tools} if chat.tools else {})
            answer = endpoint.ask("chat/completions", sampling.request(**given))
            try:
                messages.append(_turn(origin, answer["choices"][0]))
            except BadLine:
                if not count:
                    raise
                break
            count, tokens = count + 1, tokens + _tokens(answer)
            if messages[-1].get("tool_calls"):
                break  # nobody has the results of calls that the target makes here
    if not count:
        raise BadLine(f"{origin} has calls of tools only", "no turn to ask for")
    while messages[-1]["role"] != "assistant":
        messages.pop()
    return {"messages": messages} | ({"tools": chat.tools} if chat.tools else {}), tokens


def _as_history(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as a client sends it back: without thoughts and weights."""
    kept = ("role", "content", "tool_calls", "tool_call_id", "name")
    said = {name: message[name] for name in kept if name in message}
    if calls := said.get("tool_calls"):
        said["tool_calls"] = [_as_text(call, number) for number, call in enumerate(calls)]
    return said


def _as_text(call: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A tool call as the API takes it: arguments as JSON in a string."""
    function = dict(call.get("function") or {})
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments") or {})
    return {"id": f"call_{number}", "type": "function", **call, "function": function}


def _turn(origin: str, choice: Any) -> dict[str, Any]:
    """The turn that a choice of an answer is. Raises :class:`BadLine`."""
    said = _whole(origin, choice).get("message") or {}
    content, calls = said.get("content") or "", said.get("tool_calls")
    if not isinstance(content, str) or not (content or calls):
        raise BadLine(f"{origin}: an empty answer", "an empty answer")
    turn: dict[str, Any] = {"role": "assistant", "content": content}
    for name in ("reasoning_content", "reasoning"):
        if isinstance(said.get(name), str) and said[name]:
            turn["reasoning_content"] = said[name]
            break
    return turn | ({"tool_calls": calls} if calls else {})


def _whole(origin: str, choice: Any) -> Mapping[str, Any]:
    if not isinstance(choice, dict):
        raise BadLine(f"{origin}: an answer that is no object", "an answer of another form")
    if choice.get("finish_reason") not in ("stop", "tool_calls", "function_call", None):
        reason = f"an answer that ended by {choice['finish_reason']}"[:60]
        raise BadLine(f"{origin}: {reason}; more --max-tokens?", reason)
    return choice


def _tokens(answer: Mapping[str, Any]) -> int:
    usage = answer.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else 0
    return count if isinstance(count, int) else 0


# -- a file of them -------------------------------------------------------------------------------


def regenerate(
    files: Sequence[Path],
    output: Path,
    endpoint: Endpoint,
    sampling: Sampling,
    *,
    concurrency: int,
    skip_bad_lines: bool = False,
    told: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Write the answered records, as they come, as JSON lines; go on where ``output`` stops.

    What was asked lies beside it (``OUTPUT.params.json``), and must be the same to go on. Raises
    :class:`DataError` where it is not, or with the first record that cannot be used, and
    :class:`EndpointError`. Whole lines stay, however it ends.
    """
    _agree_on(
        output,
        {
            "endpoint": endpoint.url,
            **asdict(sampling),
            "files": [Contents().hash(file) for file in files],
        },
    )
    done = _written(output)
    outcome = Outcome(before=len(done))
    records = _records(files, done, skip_bad_lines, outcome)
    stop = threading.Event()

    def work(record: Record) -> tuple[dict[str, Any], int] | Exception:
        try:
            return answered(endpoint, sampling, record)
        except Exception as error:
            return error

    with output.open("a", encoding="utf-8") as file:
        for record, answer in _at_once(work, records, concurrency, stop):
            if isinstance(answer, BadLine):
                outcome.left_out[answer.reason] += 1
            elif isinstance(answer, Exception):
                raise answer
            else:
                made, tokens = answer
                line = json.dumps({"id": record.origin} | made, ensure_ascii=False)
                file.write(line.encode(errors="replace").decode() + "\n")
                file.flush()
                outcome.written += 1
                outcome.completion_tokens += tokens
            told(outcome)
    return outcome


def _records(
    files: Sequence[Path], done: set[str], skip_bad_lines: bool, outcome: Outcome
) -> Iterator[Record]:
    for file in files:
        for record in read_records(file):
            if isinstance(record, Record):
                if record.origin not in done:
                    yield record
            elif skip_bad_lines:
                outcome.left_out[record.reason] += 1
            else:
                raise record


def _at_once(
    work: Callable[[Record], Any], records: Iterable[Record], count: int, stop: threading.Event
) -> Iterator[tuple[Record, Any]]:
    """``(record, result)`` as they come, so many at once.

    The threads are daemons: an end does not wait for answers that take minutes.
    """
    asked: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
    came: queue.SimpleQueue[tuple[Record, Any]] = queue.SimpleQueue()

    def serve() -> None:
        while (record := asked.get()) is not None and not stop.is_set():
            came.put((record, work(record)))

    for _ in range(count):
        threading.Thread(target=serve, daemon=True).start()
    under_way = 0
    try:
        for record in records:
            asked.put(record)
            under_way += 1
            if under_way >= 2 * count:
                yield came.get()
                under_way -= 1
        for _ in range(under_way):
            yield came.get()
    finally:
        stop.set()
        for _ in range(count):
            asked.put(None)


def _agree_on(output: Path, wanted: dict[str, Any]) -> None:
    beside = output.with_name(output.name + ".params.json")
    try:
        if beside.exists():
            there = json.loads(beside.read_text(encoding="utf-8"))
            differing = [name for name in wanted if there.get(name) != wanted[name]]
            if differing:
                raise DataError(
                    f"{output} was begun with other {', '.join(differing)} ({beside}); go on with "
                    "the same, or name another --output"
                )
            return
        if output.exists() and output.stat().st_size:
            raise DataError(f"{output} is there, and was not begun here; name another --output")
        output.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write {output}: {error}") from None


def _written(output: Path) -> set[str]:
    """What ``output`` has already; half a line at its end, of a process that was killed, goes."""
    done, whole = set(), 0
    try:
        with output.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                done.add(str(json.loads(line)["id"]))
                whole += len(line)
        os.truncate(output, whole)
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot go on with {output}: {error}; name another --output") from None
    return done


__all__ = ["EndpointError", "Outcome", "Sampling", "answered", "regenerate"]
