"""Running prose out of the Python documentation's HTML pages: the embedded target's corpus."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from worker.targets.embedded import DOCUMENT_SEPARATOR

#: Folders of the HTML documentation that hold prose. The change log and the indexes are lists.
SECTIONS = ("tutorial", "library", "reference", "howto", "faq", "using", "extending", "c-api")

MIN_WORDS = 8  # shorter ones are labels ("Source code: Lib/heapq.py", "New in version 3.5.")
MIN_LETTERS_SHARE = 0.9  # of characters that are letters, spaces, commas or full stops
MIN_DOCUMENT_CHARS = 1000

_PLAIN = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": " - ", "…": "...", "\xa0": " ", "¶": ""}
)
_PROSE_END = re.compile(r"[.!?:]['\")]*$")
_NOT_PROSE = re.compile(r"[^A-Za-z ,.]")


class _Paragraphs(HTMLParser):
    """Collects the text of the <p> elements inside the page's <div role="main">."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._text: list[str] | None = None  # the open paragraph's pieces
        self._main_depth = 0  # how many <div>s deep, counted from the main one; 0 is outside it

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div" and (self._main_depth or ("role", "main") in attrs):
            self._main_depth += 1
        elif tag == "p" and self._main_depth:
            self._text = []

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self._main_depth:
            self._main_depth -= 1
        elif tag == "p" and self._text is not None:
            self.paragraphs.append(" ".join("".join(self._text).translate(_PLAIN).split()))
            self._text = None

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)


def is_prose(paragraph: str) -> bool:
    """Say whether a paragraph is a plain ASCII sentence or more, and not mostly code."""
    return (
        paragraph.isascii()
        and len(paragraph.split()) >= MIN_WORDS
        and _PROSE_END.search(paragraph) is not None
        and len(_NOT_PROSE.findall(paragraph)) <= (1 - MIN_LETTERS_SHARE) * len(paragraph)
    )


def paragraphs_of(html: str) -> Iterator[str]:
    """Yield the prose paragraphs of one HTML page."""
    parser = _Paragraphs()
    parser.feed(html)
    return filter(is_prose, parser.paragraphs)


def build_corpus(html_folder: Path) -> str:
    """Make the corpus from the `html` folder of the Python documentation.

    One document a page, in the order of the pages' paths; a paragraph that has already occurred
    anywhere is left out. Raises FileNotFoundError if the folder has none of the sections.
    """
    seen: set[str] = set()
    documents: list[str] = []
    for page in sorted(page for name in SECTIONS for page in (html_folder / name).glob("*.html")):
        fresh = list(
            dict.fromkeys(p for p in paragraphs_of(page.read_text("utf-8")) if p not in seen)
        )
        seen.update(fresh)
        document = "\n".join(fresh)
        if len(document) >= MIN_DOCUMENT_CHARS:
            documents.append(document)
    if not documents:
        raise FileNotFoundError(
            f"{html_folder} has no pages of the Python documentation; name the folder that holds "
            f"{', '.join(SECTIONS)} (Debian's package python3.11-doc puts it in "
            "/usr/share/doc/python3.11/html)"
        )
    return DOCUMENT_SEPARATOR.join(documents)
