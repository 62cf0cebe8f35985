"""As much of NeMo AutoModel as ``trainer_client.nemo`` touches, where there is none.

What it promises is written after NeMo AutoModel 0.7.0's interfaces; that the real ones are so is
what ``tests/engines/nemo`` shows.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

META = "eagle_meta.pt"


class Eagle3TargetBackend(ABC):
    @abstractmethod
    def generate_batch(self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor) -> Any:
        """The supervision for one batch."""

    @abstractmethod
    def get_input_embeddings(self) -> Any:
        """An object with ``weight``."""

    @property
    def supports_async(self) -> bool:
        return False


@dataclass
class Eagle3TargetBatch:
    aux_hidden_states: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    logits: Tensor | None = None
    target_probs: Tensor | None = None
    position_mask: Tensor | None = None

    def to_trainer_inputs(self) -> dict[str, Tensor]:
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


class TrainEagle3Recipe:
    """NeMo's recipe, from where it chooses a target to where it takes batches."""

    target_wrapper: Any

    def __init__(self, recipe_args: dict[str, Any], rank: int = 0) -> None:
        self.recipe_args = recipe_args
        self.dist_env = SimpleNamespace(rank=rank, is_main=rank == 0)
        self.device = torch.device("cpu")

    def setup(self, base: Any, ids: Tensor, mask: Tensor) -> None:
        self.ids, self.mask = ids, mask
        self._setup_online_target(self.recipe_args, "target", base)
        wanted = self.recipe_args.get("target_prefetch_depth", 0)
        servers = getattr(self.target_wrapper, "num_remote_servers", 1)
        self.target_prefetch_depth = min(wanted, servers)

    def _setup_online_target(
        self, recipe_cfg: Any, target_path: Any, draft_base_config: Any
    ) -> Any:
        if recipe_cfg.get("target_model_backend", "colocated") == "remote":
            self._setup_remote_target(recipe_cfg)
            self.target_wrapper.set_vocab_mapping(self.ids, self.mask)
        return self.ids, self.mask

    def _setup_remote_target(self, recipe_cfg: Any) -> None:
        raise NotImplementedError

    def _prefetched_batches(self, loader: Iterable[dict[str, Tensor]]) -> Iterator[Any]:
        batches, queue = iter(loader), deque[Any]()

        def fill() -> None:
            while len(queue) < self.target_prefetch_depth and (batch := next(batches, None)):
                asked = (batch["input_ids"], batch["attention_mask"], batch["loss_mask"])
                queue.append((batch, self.target_wrapper.generate_batch_async(*asked)))

        fill()
        try:
            while queue:
                batch, handle = queue.popleft()
                came = handle.result()
                fill()
                yield batch, came
        finally:
            for _, handle in queue:  # the loop was left early
                handle.result()

    def _save_extra_state(self, path: str, epoch: int) -> None:
        torch.save({"epoch": epoch, "ids": self.ids, "mask": self.mask}, Path(path) / META)

    def _load_extra_state(self, ckpt_dir: str) -> None:
        saved = torch.load(Path(ckpt_dir) / META)
        self.ids, self.mask = saved["ids"], saved["mask"]
        self.target_wrapper.set_vocab_mapping(self.ids, self.mask)


def install(patch: pytest.MonkeyPatch) -> None:
    """Put the modules in, and take ``trainer_client.nemo`` out, so that it is imported anew."""
    eagle = "nemo_automodel.components.speculative.eagle"
    homes: dict[str, tuple[Any, ...]] = {
        f"{eagle}.backend": (Eagle3TargetBackend,),
        f"{eagle}.target": (Eagle3TargetBatch,),
        "nemo_automodel.recipes.llm.train_eagle3": (TrainEagle3Recipe,),
    }
    for home, members in homes.items():
        parts = home.split(".")
        for depth in range(1, len(parts)):
            package = ".".join(parts[:depth])
            if package not in sys.modules:
                patch.setitem(sys.modules, package, ModuleType(package))
        module = ModuleType(home)
        for member in members:
            setattr(module, member.__name__, member)
        patch.setitem(sys.modules, home, module)
    for name in [name for name in sys.modules if name.startswith("trainer_client.nemo")]:
        patch.delitem(sys.modules, name)
