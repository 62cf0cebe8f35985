"""A draft in the format of vLLM's speculators, which names its verifier: that is, its target.

Read from speculators 0.9: ``models/eagle3/config.py`` and ``config.py`` there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from trainer_client.drafts.kinds import OUTSIDE_LAYER
from trainer_client.eagle3.config import SWITCHES

#: Tokens that the draft proposes at a time, where nobody says another number.
_PROPOSED = 5
#: What engines want at the top of their config and speculators says elsewhere, or not at all.
_NOT_THEIRS = (
    "architectures",
    "eagle_config",
    "num_aux_hidden_states",
    "rope_theta",
    "rope_scaling",
    *OUTSIDE_LAYER,
)


def speculators_config(
    engine: Mapping[str, Any], verifier: str, architectures: Sequence[str]
) -> dict[str, Any]:
    """``config.json`` of speculators, of that of engines.

    ``verifier`` is the target's name or path, as its users load it, and ``architectures`` what its
    config has under that name. The numbers of the layers are those of engines.
    """
    layers = "eagle_aux_hidden_state_layer_ids"
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": _PROPOSED}],
            "verifier": {"name_or_path": verifier, "architectures": list(architectures)},
        },
        "transformer_layer_config": {n: v for n, v in engine.items() if n not in _NOT_THEIRS},
        "draft_vocab_size": engine["draft_vocab_size"],
        layers: engine[layers],
        **{name: engine[name] for name in SWITCHES},
        "tie_word_embeddings": False,
        "torch_dtype": engine["torch_dtype"],
    }


def speculators_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by speculators' names."""
    return {name.replace("midlayer.", "layers.0.", 1): each for name, each in tensors.items()}
