"""Whatever a part says by name stands in the catalog, and whatever stands there is said."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from broker.catalog import CODES, EVENTS
from broker.protocol.messages import FAILURE_CODES
from docs import troubleshooting_table
from trainer_client import errors

ROOT = Path(__file__).parents[2]
LEVELS = {"debug", "info", "warning", "error", "critical"}
EVENT = re.compile(r"[a-z][a-z0-9_]*")


def calls() -> Iterator[tuple[Path, str, ast.Call]]:
    """Each call in the packages, with its function's last name."""
    for package in ("broker", "worker", "trainer_client"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    of = node.func
                    name = of.attr if isinstance(of, ast.Attribute) else getattr(of, "id", "")
                    yield path, name, node


def text(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def event_of(name: str, call: ast.Call) -> str:
    """The event that a call logs, or nothing: its literal follows a level's, or a logger's name."""
    said = [text(argument) for argument in call.args]
    if name in ("log", "_log", "_tell", "Log"):
        leads = [number for number, each in enumerate(said) if each in LEVELS]
        following = said[leads[0] + 1 :] if leads else []
        return following[0] if following else ""
    if name == "_note":
        return said[0] if said else ""
    logger = "logger" in ast.unparse(call.func).lower()
    if logger and name in LEVELS | {"exception"}:
        return said[0] if said else ""
    return ""


def events() -> set[str]:
    found = {event_of(name, call) for _, name, call in calls()}
    return {event for event in found if EVENT.fullmatch(event)}


def test_every_log_event_stands_in_the_catalog_and_none_that_nobody_says() -> None:
    known = {event for part in EVENTS.values() for event in part}
    assert events() == known, "put it into broker/catalog.py, with its cause and what to do"


def test_a_warning_says_what_to_do() -> None:
    severe = {"warning", "error", "critical", "exception"}
    warned = {
        event_of(name, call) for _, name, call in calls() if severe & {name, *map(text, call.args)}
    } - {""}
    silent = {
        f"{part}: {event}"
        for part, known in EVENTS.items()
        for event, each in known.items()
        if event in warned and not each.remedy
    }
    assert silent == set(), "say in broker/catalog.py what to do"


def test_an_event_reaches_the_log_by_functions_that_are_looked_at_alone() -> None:
    passing = set()
    for package in ("broker", "worker", "trainer_client"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    names = {argument.arg: argument.annotation for argument in node.args.args}
                    if isinstance(names.get("event"), ast.Name) and names["event"].id == "str":
                        passing.add(node.name)
    assert passing <= {"log", "_log", "_note", "_tell", "left_out"}, (
        "let event_of look at its callers too"
    )


def test_every_code_stands_in_the_catalog_and_none_that_nobody_says() -> None:
    refusals = {text(call.args[0]) for _, name, call in calls() if name == "Refused" and call.args}
    own = {
        text(argument)
        for _, name, call in calls()
        if name in ("fail", "request_error", "BadRequestError")
        for argument in call.args[:2]
    }
    said = refusals | own | set(FAILURE_CODES) | set(errors._KINDS)
    assert {code for code in said if EVENT.fullmatch(code)} == set(CODES)


def test_the_page_of_messages_is_current() -> None:
    written = troubleshooting_table.PATH.read_text(encoding="utf-8")
    current = troubleshooting_table.render(written)
    assert current == written, "run python -m docs.troubleshooting_table"
