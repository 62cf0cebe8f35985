"""NeMo AutoModel's recipe with its target in the trainer's process, on a CPU.

Its own loader of co-located targets wants CUDA. The generator of random numbers is left as a remote
target leaves it.
"""

from __future__ import annotations

from typing import Any

import torch
from nemo_automodel.components.speculative.eagle.target import HFEagle3TargetModel
from nemo_automodel.recipes.llm.train_eagle3 import TrainEagle3Recipe
from transformers import AutoModelForCausalLM


class ColocatedOnCpu(TrainEagle3Recipe):
    def _setup_colocated_target(self, recipe_cfg: Any, target_path: Any, base: Any) -> None:
        with torch.random.fork_rng():
            model = AutoModelForCausalLM.from_pretrained(target_path, dtype=self.compute_dtype)
        self.target_model = model.requires_grad_(False)
        self.target_wrapper = HFEagle3TargetModel(self.target_model)
