"""The code blocks of README and documents, and what is said of each above it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from tests.deploy.command_lines import ROOT

#: What the site and the repository show to readers; a changelog and decisions have no code to run.
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    ROOT / "deploy" / "README.md",
    ROOT / "broker" / "protocol" / "PROTOCOL.md",
    ROOT / "worker" / "targets" / "embedded" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
_MARK = re.compile(r"<!-- (not run|run)(?:: (.+?))? -->\s*", re.S)


@dataclass(frozen=True)
class Block:
    """A code block: where it is, its language, its text.

    ``mark`` is ``run``, ``not run`` or nothing, and ``why`` what stands behind it: the reason, or
    how a test runs it.
    """

    page: Path
    line: int
    language: str
    text: str
    mark: str = ""
    why: str = ""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """All code blocks of a page, those that are only indented too (their language is empty)."""
    before = None
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            said = before and before.type == "html_block" and _MARK.fullmatch(before.content)
            mark, why = (said[1], said[2] or "") if said else ("", "")
            yield Block(page, token.map[0] + 1, token.info.strip(), token.content, mark, why)
        before = token


def all_blocks() -> list[Block]:
    """Those of all pages."""
    return [block for page in PAGES for block in blocks_of(page)]
