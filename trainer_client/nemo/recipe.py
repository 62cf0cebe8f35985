"""NeMo AutoModel's EAGLE-3 recipe with its target behind draftmq's brokers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_automodel.recipes.llm.train_eagle3 import TrainEagle3Recipe as NemoRecipe

from broker import logs
from trainer_client.drafts.nemo import TARGET_FILE
from trainer_client.nemo.backend import BrokerTarget
from trainer_client.nemo.settings import remote_options

#: What :data:`TARGET_FILE` says, of :meth:`RemoteEagle3TargetModel.model_info`.
_FACTS = ("model", "fingerprint", "aux_layer_ids", "hidden_size", "vocab_size", "dtype")


class TrainEagle3Recipe(NemoRecipe):
    """``target_model_backend: remote`` goes to brokers (``remote_urls: [tcp://HOST:5555]``).

    All else is NeMo's. The settings beside ``remote_urls`` are in ``docs/nemo.md``.
    """

    def _setup_online_target(
        self, recipe_cfg: Any, target_path: Any, draft_base_config: Any
    ) -> Any:
        backend = recipe_cfg.get("target_model_backend", "colocated")
        if backend != "remote" and recipe_cfg.get("remote_urls", None):
            raise ValueError(
                f"recipe_args.remote_urls is given, and target_model_backend is {backend!r}, which "
                "would load the target here; say target_model_backend: remote"
            )
        self._draft_base_config = draft_base_config
        return super()._setup_online_target(recipe_cfg, target_path, draft_base_config)

    def _setup_remote_target(self, recipe_cfg: Any) -> None:
        logs.attach("info" if self.dist_env.is_main else "warning")
        options = remote_options(recipe_cfg, rank=self.dist_env.rank)
        self.target_model = None
        self.target_wrapper = BrokerTarget.from_urls(
            options.pop("urls"), device=self.device, **options
        )
        try:
            _refuse_other_target(
                self.target_wrapper.model_info(),
                recipe_cfg,
                getattr(self, "_draft_base_config", None),
            )
        except Exception:
            self.target_wrapper.close()
            raise

    def _save_extra_state(self, path: str, epoch: int) -> None:
        super()._save_extra_state(path, epoch)
        if isinstance(self.target_wrapper, BrokerTarget):
            text = json.dumps(_facts(self.target_wrapper), indent=2) + "\n"
            (Path(path) / TARGET_FILE).write_text(text, encoding="utf-8")

    def _load_extra_state(self, ckpt_dir: str) -> None:
        said = Path(ckpt_dir) / TARGET_FILE
        if isinstance(self.target_wrapper, BrokerTarget) and said.is_file():
            before, now = json.loads(said.read_text(encoding="utf-8")), _facts(self.target_wrapper)
            other = [name for name in _FACTS if name != "model" and before.get(name) != now[name]]
            if other:
                raise ValueError(
                    f"the checkpoint {ckpt_dir} was trained for another target: "
                    + "; ".join(f"{name} was {before.get(name)}, is {now[name]}" for name in other)
                    + ". Serve that one, or begin in another output_dir"
                )
        super()._load_extra_state(ckpt_dir)


def _facts(target: BrokerTarget) -> dict[str, Any]:
    info = target.model_info()
    return {name: info[name] for name in _FACTS}


def _refuse_other_target(info: dict[str, Any], recipe_cfg: Any, base: Any) -> None:
    """Raise ``ValueError`` where the workers serve what this YAML does not speak of."""
    wanted = recipe_cfg.get("aux_layer_ids", None)
    if wanted is not None and list(wanted) != list(info["aux_layer_ids"]):
        layers = ",".join(map(str, wanted))
        raise ValueError(
            f"recipe_args.aux_layer_ids is {list(wanted)}, the workers serve layers "
            f"{info['aux_layer_ids']}; start them with --aux-layers {layers}"
        )
    for name in ("hidden_size", "vocab_size", "num_hidden_layers"):
        here = getattr(base, name, None)
        if here is not None and here != info[name]:
            raise ValueError(
                f"the config of {recipe_cfg.get('target_model_name_or_path', None)!r} has {name} "
                f"{here}, the workers' model {info['model']!r} has {info[name]}; serve the model "
                "that recipe_args.target_model_name_or_path names"
            )
