"""As much of speculators, hs_connectors and datasets as our backend touches."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch


class Transfer:
    """``hs_connectors.HiddenStatesTransfer``."""


class Backend:
    """``hs_connectors.HiddenStatesBackend``."""

    registry: ClassVar[dict[str, type]] = {}

    @classmethod
    def register(cls, name: str) -> Any:
        def keep(backend: type) -> type:
            cls.registry[name] = backend
            return backend

        return keep


@dataclass(frozen=True)
class SampleUnavailable:
    """``speculators.train.recovery.SampleUnavailable``."""

    reason: str = ""
    counts_as_failure: bool = False


class Rows:
    """What ``datasets.load_from_disk`` gives: token ids in a file of torch's."""

    def __init__(self, path: str) -> None:
        self._rows = torch.load(path)

    def with_format(self, kind: str) -> Rows:
        assert kind == "torch"
        return self

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._rows[index]}


def modules() -> dict[str, ModuleType]:
    """They, by their names."""
    members: dict[str, dict[str, Any]] = {
        "datasets": {"load_from_disk": Rows},
        "hs_connectors": {"HiddenStatesBackend": Backend, "HiddenStatesTransfer": Transfer},
        "speculators": {},
        "speculators.train": {},
        "speculators.train.recovery": {"SampleUnavailable": SampleUnavailable},
    }
    made = {}
    for name, values in members.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(values)
    return made
