"""The names of the API reference are there and say what they are."""

from __future__ import annotations

import pydoc
import re
from pathlib import Path

import pytest

import trainer_client

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
NAMES = re.findall(r"^::: ([\w.]+)$", PAGE, re.M)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_there_and_has_a_docstring(name: str) -> None:
    found = pydoc.locate(name)
    assert found is not None
    assert pydoc.getdoc(found)


def test_what_the_package_exports_is_public() -> None:
    public = set(NAMES)
    for name, home in trainer_client._HOMES.items():
        assert {home, f"{home}.{name}"} & public, name
        assert f"`{name}`" in PAGE
