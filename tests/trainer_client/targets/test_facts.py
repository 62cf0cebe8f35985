from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from broker.protocol import messages as m
from trainer_client.errors import IdentityError
from trainer_client.targets.facts import model_facts
from worker.targets.contract import describe
from worker.targets.stub import StubTarget

FACTS = json.loads(json.dumps(asdict(describe(StubTarget())))) | {"offer": "0f"}


def facts_of(info_json: str) -> dict[str, Any]:
    request_id = m.RequestId("c", 1, 1)
    return model_facts(m.Reply(request_id, "w7", "stub", "f", (), 0, "", "", 0.0, info_json, ()))


def test_what_a_worker_says_of_its_target_is_taken_as_it_is() -> None:
    assert facts_of(json.dumps(FACTS)) == FACTS


@pytest.mark.parametrize(
    ("info_json", "what"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[" * 200_000, "no JSON"),
        ("7", "7 where an object was expected"),
        ("{}", "no model"),
        (json.dumps(FACTS | {"vocab_size": 0}), "vocab_size 0 where a number from 1 was"),
        (json.dumps(FACTS | {"vocab_size": True}), "vocab_size True where"),
        (json.dumps(FACTS | {"hidden_size": "16"}), "hidden_size '16' where"),
        (json.dumps(FACTS | {"encodings": "probs"}), "encodings 'probs' where names of"),
        (json.dumps(FACTS | {"encodings": []}), "encodings [] where"),
        (json.dumps(FACTS | {"encodings": [1]}), "encodings [1] where"),
        (json.dumps(FACTS | {"aux_layer_ids": [-1]}), "aux_layer_ids [-1] where layer numbers"),
        (json.dumps(FACTS | {"config": None}), "config None where an object was expected"),
        (json.dumps(FACTS | {"model": ["x" * 500]}), "..."),
    ],
)
def test_what_is_no_description_names_the_worker_and_the_field(info_json: str, what: str) -> None:
    with pytest.raises(IdentityError) as caught:
        facts_of(info_json)
    assert str(caught.value).startswith("worker w7 answered model_info with ")
    assert what in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("field", FACTS)
def test_no_field_may_be_missing(field: str) -> None:
    with pytest.raises(IdentityError, match=f"with no {field};"):
        facts_of(json.dumps({key: value for key, value in FACTS.items() if key != field}))
