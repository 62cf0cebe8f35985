"""The shape of a draft: one fused Llama layer, sized after its target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import LlamaConfig


#: The families of drafts that are trained here.
Family = Literal["eagle3", "eagle3.1"]
#: What makes another network of a draft, by the names that engines know.
SWITCHES = ("fc_norm", "norm_before_fc", "norm_output", "norm_before_residual")
#: What a family of drafts switches on.
FAMILIES: dict[Family, dict[str, bool]] = {
    "eagle3": {},
    "eagle3.1": {"fc_norm": True, "norm_output": True},
}


@dataclass(frozen=True)
class DraftConfig:
    """Sizes of an :class:`~trainer_client.eagle3.draft.Eagle3Draft`. Raises ``ValueError``."""

    vocab_size: int  # V, the target's
    draft_vocab_size: int  # D
    target_hidden_size: int  # of the aux states and of the target's embeddings
    hidden_size: int  # H of the draft; embeddings are shared, so it is the target's
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    #: in the form of transformers 5: ``rope_type``, ``rope_theta`` and what the type wants
    rope_parameters: Mapping[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    num_aux_hidden_states: int = 3  # L, layers of the target that are fused
    #: EAGLE-3.1: each aux state has a norm of its own before they are fused
    fc_norm: bool = False
    #: one norm over all aux states instead
    norm_before_fc: bool = False
    #: EAGLE-3.1: the next depth reads what the head reads, behind the final norm
    norm_output: bool = False
    #: the residual of the layer is the normed hidden state; SGLang does not know it
    norm_before_residual: bool = False

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type in ("int", "float"):
                number = (int,) if each.type == "int" else (int, float)
                if type(value) not in number or value <= 0:
                    raise ValueError(f"{each.name} must be a number above 0, got {value!r}")
        if self.hidden_size != self.target_hidden_size:
            raise ValueError(
                f"the draft's hidden size ({self.hidden_size}) must be the target's "
                f"({self.target_hidden_size}): both read the target's embeddings"
            )
        if self.num_aux_hidden_states < 2:
            raise ValueError("a draft fuses at least 2 aux states; SGLang skips fc where it is 1")
        if self.fc_norm and self.norm_before_fc:
            raise ValueError("fc_norm and norm_before_fc are two forms of one thing; choose one")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"the hidden size ({self.hidden_size}) is no multiple of "
                f"{self.num_attention_heads} attention heads, as transformers' Llama wants it"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} attention heads are no multiple of "
                f"{self.num_key_value_heads} key-value heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, for RoPE; got {self.head_dim}")
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"the draft vocab has {self.draft_vocab_size} tokens; it must have 1 to "
                f"{self.vocab_size}, the target's"
            )

    @classmethod
    def from_target_info(
        cls, info: Mapping[str, Any], draft_vocab_size: int, **overrides: Any
    ) -> DraftConfig:
        """A draft like one layer of the target that ``info`` (``model_info()``) describes."""
        config = info["config"]
        hidden, heads = info["hidden_size"], _heads(config)
        sizes: dict[str, Any] = {
            "vocab_size": info["vocab_size"],
            "draft_vocab_size": draft_vocab_size,
            "target_hidden_size": hidden,
            "hidden_size": hidden,
            "intermediate_size": int(config.get("intermediate_size") or 4 * hidden),
            "num_attention_heads": heads,
            "num_key_value_heads": int(config.get("num_key_value_heads") or heads),
            "head_dim": int(config.get("head_dim") or hidden // heads),
            "max_position_embeddings": info["max_position_embeddings"] or 2048,
            "rms_norm_eps": float(config.get("rms_norm_eps") or 1e-6),
            "rope_parameters": rope_parameters(config),
            "num_aux_hidden_states": len(info.get("aux_layer_ids") or (0, 0, 0)),
        }
        return cls(**(sizes | overrides))

    def to_llama(self) -> LlamaConfig:
        """The config of transformers' Llama with these sizes."""
        from transformers import LlamaConfig

        sizes = asdict(self) | {"num_hidden_layers": 1, "tie_word_embeddings": False}
        sizes["rms_norm_eps"] = float(self.rms_norm_eps)  # 1 is no float to transformers
        for ours in ("draft_vocab_size", "target_hidden_size", "num_aux_hidden_states", *SWITCHES):
            del sizes[ours]
        return LlamaConfig(**sizes)


def _heads(config: Mapping[str, Any]) -> int:
    heads = config.get("num_attention_heads") or config.get("n_head")  # n_head: GPT-2, Falcon
    if not heads:
        raise ValueError(
            "the target's config says no number of attention heads (num_attention_heads, n_head)"
        )
    return int(heads)


def _mapping(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be an object, got {value!r}")
    return dict(value)


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE of a Hugging Face config, from the form of transformers 5 or of 4.

    A draft rotates whole heads, along one axis. What the target says of parts of a head (Phi) or
    of several axes (Qwen-VL) is left out: engines would obey it. Raises ``ValueError``.
    """
    parameters = _mapping(config, "rope_parameters")
    layer_types = {name: v for name, v in parameters.items() if isinstance(v, Mapping)}  # Gemma 3
    if layer_types:
        parameters = dict(layer_types.get("full_attention") or next(iter(layer_types.values())))
    if not parameters:
        parameters = _mapping(config, "rope_scaling")
        parameters.setdefault("rope_type", parameters.pop("type", "default"))
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    whole = parameters.pop("partial_rotary_factor", None) in (None, 1.0)
    if not whole or parameters.get("rope_type") == "mrope":
        return {"rope_type": "default", "rope_theta": theta}
    if parameters.get("rope_type") == "longrope" and "original_max_position_embeddings" in config:
        name = "original_max_position_embeddings"
        parameters.setdefault(name, config[name])
    kept = {name: value for name, value in parameters.items() if not name.startswith("mrope_")}
    return {"rope_type": "default"} | kept | {"rope_theta": theta}
