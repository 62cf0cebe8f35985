"""The specification is of the version that the code speaks."""

from __future__ import annotations

from broker.protocol.document import PATH
from broker.protocol.wire import VERSION


def test_the_specification_names_the_version_that_is_spoken() -> None:
    text = PATH.read_text(encoding="utf-8")
    assert f"# The draftmq protocol, version {VERSION}\n" in text
    assert f"| version, {VERSION} |" in text
