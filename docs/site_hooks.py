"""What the site of ``make docs`` consists of: pages, the files that they link to, and the order.

A page keeps its place in the repository, so that a link works on the site as it does in a checkout.
What a page links to and is no page itself (a test, a dashboard) is copied beside it. MkDocs then
warns of every link to a file or heading that is not there, and ``--strict`` makes that an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
INDEX = "docs/README.md"
#: Pages from which the others are found by their links.
START = ("README.md", INDEX)
_LINK = re.compile(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take the navigation from the index: a section for each heading, a page for each link."""
    sections: dict[str, list[str]] = {}
    title = ""
    for line in (ROOT / INDEX).read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ")
        elif title and line.startswith("|"):
            sections.setdefault(title, []).extend(_linked(INDEX, line))
    listed = {page for pages in sections.values() for page in pages}
    others = [page for page in _closure() if page.endswith(".md") and page not in listed]
    config.nav = [{"draftmq": "README.md"}, {"Documents": INDEX}]
    config.nav += [{name: list(dict.fromkeys(pages))} for name, pages in sections.items()]
    decisions = [page for page in others if page.startswith("docs/decisions/")]
    rest = [page for page in others if page not in {*START, *decisions}]
    for name, pages in (("Decisions", sorted(decisions)), ("More", sorted(rest))):
        config.nav += [{name: pages}] if pages else []
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace what lies in ``docs/`` by all that can be reached from the first pages."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    pages = [
        File(path, str(ROOT), config.site_dir, config.use_directory_urls) for path in _closure()
    ]
    return Files([*theme, *pages])


def _closure() -> list[str]:
    """The first pages and whatever they link to, as paths from the root of the repository."""
    found = dict.fromkeys(START)
    waiting = list(START)
    while waiting:
        page = waiting.pop()
        for target in _linked(page, (ROOT / page).read_text(encoding="utf-8")):
            if target not in found and (ROOT / target).is_file():
                found[target] = None
                if target.endswith(".md"):
                    waiting.append(target)
    return list(found)


def _linked(page: str, text: str) -> Iterator[str]:
    for link in _LINK.findall(text):
        target = (ROOT / page).parent.joinpath(link).resolve()
        if target.is_relative_to(ROOT):
            yield target.relative_to(ROOT).as_posix()
