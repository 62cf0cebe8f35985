"""Every ``draftmq`` command line of deploy/ passes the real argument parser."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from tests.deploy import command_lines as lines

SYSTEMD = lines.DEPLOY / "systemd"


def test_a_wrong_command_line_would_be_noticed() -> None:
    for wrong in (["worker", "--target", "x"], ["broker", "--port", "1"], ["serve"]):
        with pytest.raises(click.UsageError):
            lines.parse(wrong)


def test_the_finder_sees_commands_wherever_a_shell_does() -> None:
    text = (
        "A=1 draftmq status --json | head  # draftmq nothing\n"
        "# draftmq comment\n"
        'srun draftmq worker --broker "tcp://a:1" \\\n  --target x &\n'
        "torchrun --nnodes 2 -m trainer_client --data d && echo draftmq-broker\n"
        'sbatch --wrap "srun draftmq broker --insecure"\n'
    )
    assert list(lines.in_shell(text)) == [
        ["status", "--json"],
        ["worker", "--broker", "tcp://a:1", "--target", "x"],
        ["train", "--data", "d"],
        ["broker", "--insecure"],
    ]


@pytest.mark.parametrize("dockerfile", sorted(lines.COMPOSE.glob("*.Dockerfile")), ids=str)
def test_images_run_commands_that_exist(dockerfile: Path) -> None:
    found = lines.in_dockerfile(dockerfile)
    kind = dockerfile.name.partition(".")[0]
    needed = {"DRAFTMQ_WORKER_BROKER": "tcp://broker:5556"} if kind == "worker" else {}
    assert lines.parse(found["command"], needed).info_name == kind
    if kind == "broker":
        assert lines.parse(found["health"]).info_name == "status"


def test_compose_services_run_commands_that_exist() -> None:
    found = lines.in_compose(lines.COMPOSE / "compose.yaml", {})
    parsed = {name: lines.parse(arguments) for name, arguments in found.items()}
    assert {name: context.info_name for name, context in parsed.items()} == {
        "broker": "broker",
        "broker healthcheck": "status",
        "worker": "worker",
        "trainer": "train",
    }
    assert lines.option(parsed["worker"], "target") == "embedded"
    assert lines.option(parsed["worker"], "broker") == ("tcp://broker:5556",)
    assert lines.option(parsed["trainer"], "data") == (Path("/data/train.jsonl"),)


def test_units_run_commands_whose_settings_are_options() -> None:
    for kind, file in (("broker", "draftmq-broker"), ("worker", "draftmq-worker@")):
        arguments = lines.unit(SYSTEMD / f"{file}.service")["Service"]["ExecStart"][0].split()
        settings = lines.settings(SYSTEMD / f"{kind}.env")
        context = lines.parse(arguments[1:], settings)
        assert context.info_name == kind
        known = {f"DRAFTMQ_{kind}_{p.name}".upper(): p.name for p in context.command.params}
        assert set(settings) <= set(known), "a setting that nothing reads"
        for variable in settings:
            source = context.get_parameter_source(known[variable])
            assert source == click.core.ParameterSource.ENVIRONMENT
