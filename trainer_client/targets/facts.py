"""Checks what workers say of their model, before anything relies on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from broker.protocol import messages as m
from trainer_client.errors import IdentityError


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _positive(value: object) -> bool:
    return _whole(value) and value != 0


def _text(value: object) -> bool:
    return isinstance(value, str)


def _list_of(of: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(map(of, value))


def _layers(value: object) -> bool:
    return isinstance(value, list) and all(each == -1 or _whole(each) for each in value)


#: field -> what it must be, for the error | whether it is
_FIELDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "model": ("a text", _text),
    "fingerprint": ("a text", _text),
    "num_hidden_layers": ("a number from 1", _positive),
    "hidden_size": ("a number from 1", _positive),
    "vocab_size": ("a number from 1", _positive),
    "aux_layer_ids": ("layer numbers", _list_of(_whole)),
    "dtype": ("a text", _text),
    "max_position_embeddings": ("a number from 0", _whole),
    "encodings": ("names of encodings", _list_of(_text)),
    "layers": ("layer numbers from -1, or none", _layers),
    "engine": ("a text", _text),
    "tokenizer": ("a text", _text),
    "config": ("an object", lambda value: isinstance(value, dict)),
    "offer": ("a text", _text),
}


def model_facts(reply: m.Reply) -> dict[str, Any]:
    """The answer to ``model_info``. Raises :class:`IdentityError` that names worker and field."""
    try:
        said = json.loads(reply.info_json)
    except (ValueError, RecursionError) as error:
        raise _not_facts(reply, f"what is no JSON ({error})") from None
    if not isinstance(said, dict):
        raise _not_facts(reply, f"{_shown(said)} where an object was expected")
    for field, (wanted, holds) in _FIELDS.items():
        if field not in said:
            raise _not_facts(reply, f"no {field}")
        if not holds(said[field]):
            raise _not_facts(reply, f"{field} {_shown(said[field])} where {wanted} was expected")
    return said


def _not_facts(reply: m.Reply, what: str) -> IdentityError:
    return IdentityError(
        "identity",
        f"worker {reply.worker} answered model_info with {what}; run the same draftmq release on "
        "workers and trainers, or stop that worker",
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
