from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer_client.commands.tokenizer import load_tokenizer
from trainer_client.errors import TrainerClientError

_CODE = """
from transformers import PreTrainedTokenizer

class Letters(PreTrainedTokenizer):
    vocab_size = 128
    def get_vocab(self): return {chr(n): n for n in range(128)}
    def _tokenize(self, text): return list(text)
    def _convert_token_to_id(self, token): return ord(token)
    def _convert_id_to_token(self, number): return chr(number)
"""


@pytest.fixture
def own_code(tmp_path: Path) -> str:
    """A tokenizer that is a class of its own, as some models bring."""
    (tmp_path / "letters.py").write_text(_CODE)
    said = {"tokenizer_class": "Letters", "auto_map": {"AutoTokenizer": ["letters.Letters", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    return str(tmp_path)


def test_code_of_its_own_runs_when_it_may_only(own_code: str) -> None:
    with pytest.raises(TrainerClientError, match="code of its own; --trust-remote-code runs it"):
        load_tokenizer(own_code, False)
    assert load_tokenizer(own_code, True)("abc")["input_ids"] == [97, 98, 99]


def test_a_tokenizer_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(TrainerClientError, match=r"cannot load the tokenizer '.*nowhere': ."):
        load_tokenizer(str(tmp_path / "nowhere"), False)
