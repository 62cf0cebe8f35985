"""What tools say of the files in deploy/."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.deploy import command_lines as lines
from worker.cli import worker as worker_command

UNITS = sorted((lines.DEPLOY / "systemd").glob("*.service"))
DOCKERFILES = sorted(lines.COMPOSE.glob("*.Dockerfile"))
SCRIPTS = [
    lines.ROOT / ".ci" / "run",
    *sorted(lines.DEPLOY.rglob("*.sh")),
    *sorted(lines.DEPLOY.rglob("*.sbatch")),
]


def tool(name: str, *arguments: str | Path) -> None:
    """Run a linter of the environment's; what it says is the failure."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}") or shutil.which(name)
    assert path, f"{name} is not installed; install '.[dev]'"
    result = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts(script: Path) -> None:
    tool("shellcheck", script)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles(dockerfile: Path) -> None:
    tool("hadolint", dockerfile)


def test_compose_files_are_of_the_compose_specification() -> None:
    files = sorted(lines.COMPOSE.glob("*.yaml"))
    assert len(files) == 2
    tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *files)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_are_what_systemd_takes(unit: Path, tmp_path: Path) -> None:
    here = tmp_path / unit.name.replace("@", "@0")
    here.write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", unit.read_text()))
    (tmp_path / unit.name).write_text(here.read_text())
    tool("systemd-analyze", "verify", "--man=no", here)
    wanted = "20" if "broker" in unit.name else "40"  # tenths of "exposure"; 100 is none at all
    tool("systemd-analyze", "security", "--offline=true", f"--threshold={wanted}", here)


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_wait_for_ready_and_leave_time_to_drain(unit: Path) -> None:
    service = lines.unit(unit)["Service"]
    assert service["Type"] == ["notify"]
    assert service["KillSignal"] == ["SIGTERM"]
    assert service["RestartPreventExitStatus"] == ["2"]
    if "worker" in unit.name:
        set_here = lines.settings(lines.DEPLOY / "systemd" / "worker.env")
        assert int(service["TimeoutStopSec"][0]) > float(set_here["DRAFTMQ_WORKER_DRAIN_S"])


def test_a_line_that_is_no_setting_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "x.service").write_text("[Service]\nExecStart /bin/true\n")
    with pytest.raises(ValueError, match="is no setting"):
        lines.unit(tmp_path / "x.service")


def test_containers_leave_time_to_drain_and_run_as_nobody() -> None:
    services = yaml.safe_load((lines.COMPOSE / "compose.yaml").read_text())["services"]
    drain_s = float(lines.option(lines.parse(services["worker"]["command"]), "drain_s"))
    assert int(services["worker"]["stop_grace_period"].removesuffix("s")) > drain_s
    default = next(p.default for p in worker_command.params if p.name == "drain_s")
    assert default == 30, "say the new default in deploy/"
    for name, service in services.items():
        assert service["init"], name
        assert service["cap_drop"] == ["ALL"], name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} opens {port} to others, unencrypted"
    for dockerfile in DOCKERFILES:
        assert "\nUSER 10001" in dockerfile.read_text()


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_an_image_copies_is_there_and_not_ignored(dockerfile: Path) -> None:
    patterns = Path(f"{dockerfile}.dockerignore").read_text().splitlines()
    admitted = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    for source in _copied(dockerfile):
        assert (lines.ROOT / source).exists(), source
        assert any(source == there or source.startswith(f"{there}/") for there in admitted), source


def test_the_brokers_image_has_all_that_the_broker_imports(tmp_path: Path) -> None:
    dockerfile = lines.COMPOSE / "broker.Dockerfile"
    for source in _copied(dockerfile):
        to = tmp_path / source
        to.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (lines.ROOT / source).is_dir() else shutil.copy
        copy(lines.ROOT / source, to)
    project = tomllib.loads((lines.ROOT / "pyproject.toml").read_text())["project"]
    wanted = [re.split(r"[<>=]", need)[0] for need in project["dependencies"]]
    admitted = _with_dependencies(wanted)
    there = importlib.metadata.packages_distributions()
    modules = [top for top, names in there.items() if {_plain(name) for name in names} & admitted]
    program = (
        "import json, sys, importlib.abc\n"
        "admitted = set(json.loads(sys.argv[1])) | set(sys.stdlib_module_names)\n"
        "class OnlyTheImage(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] not in admitted:\n"
        "            raise ImportError(f'{name} is not in the image')\n"
        "sys.meta_path.insert(0, OnlyTheImage())\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from broker.commands import cli\n"
        "import broker.commands as where\n"
        "assert where.__file__.startswith(sys.argv[2])\n"
        "import contextlib, importlib.util, io, click\n"
        "there = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: there(name) if name in admitted else None\n"
        "from broker.commands import _COMMANDS\n"
        "for name, entry in _COMMANDS.items():\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stdout(said), contextlib.suppress(click.ClickException):\n"
        "        cli.main([name, '--help'], standalone_mode=False)\n"
        "    assert bool(said.getvalue()) == (not entry.extra), name\n"
        "from broker.service import Broker\n"
        "from broker.watch.screen import screen\n"
        "with Broker(http='127.0.0.1:0') as broker:\n"
        "    screen(broker.snapshot())\n"
    )
    names = json.dumps([*modules, "broker", "worker", "trainer_client"])
    run = [sys.executable, "-I", "-c", program, names, str(tmp_path)]
    result = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def _copied(dockerfile: Path) -> list[str]:
    """What a Dockerfile copies from the repository."""
    copies = re.findall(r"^COPY (?!--from)(.+)$", dockerfile.read_text(), re.M)
    return [source for copy in copies for source in copy.split()[:-1]]


def _with_dependencies(names: list[str]) -> set[str]:
    """These distributions and all that they need here; a need of another platform is not here."""
    found: set[str] = set()
    while names:
        name = _plain(names.pop())
        if name in found:
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            needs = importlib.metadata.requires(name) or []
            names += [re.split(r"[ ;<>=!~\[(]", need)[0] for need in needs if "extra" not in need]
            found.add(name)
    return found


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
