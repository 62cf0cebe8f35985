"""Their training with our backend: ``torchrun -m trainer_client.speculators ARGUMENTS``."""

from __future__ import annotations

import runpy
import sys

import trainer_client.speculators.backend  # noqa: F401 - registers the backend

_BACKEND = "--hidden-states-backend"


def main() -> None:
    """Run ``speculators.train`` with the arguments of this process."""
    if not any(argument.startswith(_BACKEND) for argument in sys.argv[1:]):
        sys.argv[1:1] = [_BACKEND, "draftmq"]
    runpy.run_module("speculators.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
