"""The arrows between the rooms of the house: who may import whom, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Rooms of ``broker/`` that only connecting peers use; the daemon never loads them.
_PEERS_OF_BROKER = "broker.peer"


def _modules(*packages: str) -> Iterator[tuple[str, Path]]:
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), path


def imported(path: Path) -> set[str]:
    """All dotted names that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _within(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def _all(*packages: str) -> list[object]:
    return [pytest.param(name, path, id=name) for name, path in _modules(*packages)]


@pytest.mark.parametrize(("name", "path"), _all("broker"))
def test_the_broker_imports_nothing_of_its_siblings(name: str, path: Path) -> None:
    assert not [there for there in imported(path) if _within(there, "worker", "trainer_client")]


@pytest.mark.parametrize(("name", "path"), _all("broker/protocol"))
def test_the_protocol_imports_nothing_else_of_the_broker(name: str, path: Path) -> None:
    others = [there for there in imported(path) if _within(there, "broker")]
    assert all(_within(there, "broker.protocol") for there in others), others


@pytest.mark.parametrize(("name", "path"), _all("broker"))
def test_only_the_connection_code_of_peers_knows_torch_and_the_daemon_does_not_know_it(
    name: str, path: Path
) -> None:
    if _within(name, _PEERS_OF_BROKER):
        return
    unwanted = [there for there in imported(path) if _within(there, "torch", _PEERS_OF_BROKER)]
    assert not unwanted


@pytest.mark.parametrize(("name", "path"), _all("trainer_client"))
def test_the_trainer_takes_of_the_worker_its_tensors_transfers_and_targets(
    name: str, path: Path
) -> None:
    from_worker = [there for there in imported(path) if _within(there, "worker")]
    allowed = ("worker.supervision", "worker.direct", "worker.targets", "worker.errors")
    assert all(_within(there, *allowed) for there in from_worker), from_worker


@pytest.mark.parametrize(("name", "path"), _all("broker", "worker", "trainer_client"))
@pytest.mark.parametrize(
    ("room", "theirs", "doors"),
    [
        ("trainer_client.nemo", ("nemo_automodel",), ()),
        (
            "trainer_client.speculators",
            ("speculators", "hs_connectors"),
            ("trainer_client.commands.speculators",),
        ),
    ],
)
def test_only_the_room_for_another_trainer_needs_it(
    name: str, path: Path, room: str, theirs: tuple[str, ...], doors: tuple[str, ...]
) -> None:
    if not _within(name, room, *doors):
        assert not [there for there in imported(path) if _within(there, room, *theirs)]


@pytest.mark.parametrize(("name", "path"), _all("worker"))
def test_the_worker_imports_nothing_of_the_trainer(name: str, path: Path) -> None:
    assert not [there for there in imported(path) if _within(there, "trainer_client")]


def test_the_reader_of_imports_sees_those_inside_functions(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("import os.path\ndef f():\n    from worker.core import machine\n")
    assert imported(path) == {"os.path", "worker.core.machine"}
