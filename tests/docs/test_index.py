"""The index names every document: it is the navigation of the site."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_every_page_stands_in_the_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", index))
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} == listed


def test_every_decision_stands_in_their_index() -> None:
    folder = DOCS / "decisions"
    index = (folder / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", index))
    assert {page.name for page in folder.glob("[0-9]*.md")} == listed
