"""``draftmq speculators-train``."""

from __future__ import annotations

import sys

import click

_EXAMPLE = """\b
Example:
  draftmq speculators-train --draftmq tcp://HOST:5555 --speculator-type dflash \\
      --verifier-name-or-path Qwen/Qwen3-8B --data-path data --save-path out"""


@click.command(
    "speculators-train", epilog=_EXAMPLE, context_settings={"ignore_unknown_options": True}
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def speculators_train(arguments: tuple[str, ...]) -> None:
    """Run the training of vLLM's speculators on supervision from our workers.

    ARGUMENTS are those of speculators train; --draftmq and what begins so are ours. All of them:
    python -m trainer_client.speculators --help. Several ranks: torchrun -m
    trainer_client.speculators ARGUMENTS.
    """
    try:
        from trainer_client.speculators.__main__ import main
    except ImportError as error:
        raise click.ClickException(str(error)) from None
    sys.argv[1:] = arguments
    main()
