"""``python -m tests.chaos``: the long runs. Ends with 1 when anything is not as promised."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import click

from tests.chaos.run import Result, Run, as_json

#: Trained in about 12 s when nothing happens.
_ROUND_STEPS = 400
#: A cut comes every so many steps, at random; and a round has so many for each, so that all come.
_CUT_EVERY_STEPS, _STEPS_A_CUT = 3, 4
#: A cut connection is back within the first reconnect interval (0.05 s) and these seconds.
_MAX_CUT_STALL_S = 2.05
#: Steps for one restart of the broker, and what one may cost beyond the time that it is away.
_STEPS_A_RESTART, _MAX_RESTART_COST_S = 40, 3.0
#: No fault lasts longer than 7 s; what stands still for longer than this has hung.
_MAX_STALL_S = 30.0


@click.command()
@click.option("--minutes", type=float, default=10.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--cuts", type=int, default=0, help="Only cut connections, so often, in one round.")
@click.option("--restarts", type=int, default=0, help="Only restart the broker, so often.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("build/chaos.json"))
def main(minutes: float, seed: int, cuts: int, restarts: int, output: Path) -> None:
    """Train a draft under faults, and see that it is the draft of an undisturbed run.

    Logs, checkpoints and drafts stay in a directory beside the output, with its name.
    """
    directory = output.with_suffix("")
    shutil.rmtree(directory, ignore_errors=True)
    steps = cuts * _STEPS_A_CUT or restarts * _STEPS_A_RESTART or _ROUND_STEPS
    run = Run(directory, seed, steps)
    try:
        run.prepare()
        if cuts:
            run.cuts(cuts, _CUT_EVERY_STEPS)
        elif restarts:
            run.restarts(restarts)
        else:
            run.chaos(60 * minutes)
        result = run.finish()
    finally:
        run.cluster.close()
    limit_s = _MAX_CUT_STALL_S if cuts else _MAX_STALL_S
    if result.longest_stall_s > limit_s:
        result.broken.append(f"a stall of {result.longest_stall_s:.2f} s, allowed are {limit_s} s")
    cost_s = max(result.restart_costs_s, default=0.0)
    if cost_s > _MAX_RESTART_COST_S:
        result.broken.append(f"a restart cost {cost_s:.2f} s, allowed are {_MAX_RESTART_COST_S} s")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(
        json.dumps(as_json(result, seed=seed, cuts=cuts, restarts=restarts), indent=1) + "\n"
    )
    show(result)
    sys.exit(bool(result.broken))


def show(result: Result) -> None:
    """The table."""
    rows: list[tuple[str, object]] = [
        ("seconds under faults", round(result.seconds)),
        ("training runs", result.rounds),
        ("faults injected", sum(result.faults.values())),
        *((f"  {name}", count) for name, count in sorted(result.faults.items())),
        *result.counters.items(),
        ("longest stall", f"{result.longest_stall_s:.2f} s"),
        ("median step, undisturbed", f"{result.median_step_s:.3f} s"),
        *(
            ("longest restart, beyond absence", f"{max(costs):.2f} s")
            for costs in [result.restart_costs_s]
            if costs
        ),
        ("weights identical", "yes" if result.weights_identical else "NO"),
        ("orphan processes", result.orphans),
        ("files more than undisturbed", result.files_more),
        ("memory more than undisturbed", f"{result.mib_more:.0f} MiB"),
    ]
    for name, value in rows:
        click.echo(f"{name:32}{value}")
    for text in result.broken:
        click.echo(f"BROKEN: {text}", err=True)


if __name__ == "__main__":
    main()
