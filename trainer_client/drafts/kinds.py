"""What a draft on disk is, and who wrote it: from its config and the names of its tensors.

Read from speculators 0.9, NeMo AutoModel 0.7, SpecForge and vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from trainer_client.drafts import nemo

#: What speculators' format keeps beside the config of the layers.
OUTSIDE_LAYER = (
    "draft_vocab_size",
    "norm_before_residual",
    "norm_before_fc",
    "fc_norm",
    "norm_output",
    "target_hidden_size",
    "eagle_aux_hidden_state_layer_ids",
    "tie_word_embeddings",
    "torch_dtype",
    "dtype",
)


@dataclass(frozen=True)
class Kind:
    """A draft's family and the layout in which it lies."""

    #: "EAGLE-3", "EAGLE-3.1", "P-EAGLE", "DFlash", "DFlash 2", "DSpark", or speculators' own word
    family: str
    #: "engine" (what vLLM and SGLang load), "speculators" or "NeMo AutoModel"
    layout: str = "engine"

    def __str__(self) -> str:
        where = {"engine": "", "speculators": " in speculators' format"}
        return f"{self.family} draft{where.get(self.layout, f' as {self.layout} writes it')}"


def kind_of(config: Mapping[str, Any], names: Collection[str]) -> Kind:
    """The kind of a draft with this ``config.json`` and tensors of these names."""
    architecture = " ".join(map(str, _list(config.get("architectures"))))
    said = config.get("speculators_model_type")
    layout = "engine"
    if said is not None:
        layout = "speculators"
    elif nemo.is_nemos(config):
        layout = "NeMo AutoModel"
    return Kind(_family(config, names, f"{architecture} {said or ''}".lower()), layout)


def _family(config: Mapping[str, Any], names: Collection[str], words: str) -> str:
    last = {name.removeprefix("model.").split(".")[0] for name in names}
    if "dspark" in words or "markov_head" in last:
        return "DSpark"
    if "dflash2" in words:
        return "DFlash 2"
    if "dflash" in words or "dflash_config" in config:
        return "DFlash"
    if "peagle" in words or "mask_hidden" in last or config.get("parallel_drafting"):
        return "P-EAGLE"
    said = config.get("speculators_model_type")
    if said not in (None, "eagle3"):
        return str(said)
    newer = ("fc_norm", "norm_before_fc", "norm_output")
    inside = config.get("eagle_config")
    in_eagle_config = inside.get("norm_before_fc") if isinstance(inside, Mapping) else None
    later = "fc_norm" in last or in_eagle_config or any(config.get(name) for name in newer)
    return "EAGLE-3.1" if later else "EAGLE-3"


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config in the form that engines load: speculators' keeps the layers' own one level down,
    NeMo's has settings of its target.

    What speculators leaves out of its file has the defaults of its reader in vLLM.
    """
    if nemo.is_nemos(config):
        return nemo.plain_config(config)
    inner = config.get("transformer_layer_config")
    if config.get("speculators_model_type") is None or not isinstance(inner, Mapping):
        return dict(config)
    beside = {name: config[name] for name in OUTSIDE_LAYER if config.get(name) is not None}
    plain = {"norm_before_residual": True, **inner, **beside}
    plain.setdefault("target_hidden_size", plain.get("hidden_size"))
    return plain


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
