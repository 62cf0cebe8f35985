"""Which of our layers are theirs: speculators and vLLM count a layer's output one higher.

Their id k is the output of decoder layer k-1, as it is before any norm; 0 is the embeddings, and
the number of layers is the last layer's output, which they want behind the layers of a draft.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from broker.protocol.wish import Wish

#: Where a draft's config in their format has its layers.
_KEYS = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids", "target_layer_ids")


def target_layers(args: Any) -> tuple[int, ...] | None:
    """The layers of their training's arguments, in their count; None where they take the default.

    A draft that is trained on (``--from-pretrained``) has its own; MTP wants none but the last.
    """
    if args.speculator_type == "mtp":
        return ()
    if args.target_layer_ids:
        return tuple(int(layer) for layer in args.target_layer_ids)
    config = Path(str(getattr(args, "from_pretrained", "") or ""), "config.json")
    if config.is_file():
        said = json.loads(config.read_text(encoding="utf-8"))
        return next((tuple(said[key]) for key in _KEYS if said.get(key)), None)
    return None


def default_layers(num_layers: int) -> tuple[int, ...]:
    """What they take where nothing is said, in their count."""
    return (2, num_layers // 2, num_layers - 3)


def wish_for(theirs: Sequence[int], num_layers: int, *, fp8: bool) -> Wish:
    """The wish that has their layers and the last one, un-normed; ours ascend, whatever they do."""
    wanted = {layer - 1 for layer in (*theirs, num_layers)}
    return Wish(layers=tuple(sorted(wanted)), fp8_states=fp8)


def columns(theirs: Sequence[int], num_layers: int, wish: Wish) -> list[int]:
    """Where in the wish's states each of theirs is, and then the last one."""
    return [wish.layers.index(layer - 1) for layer in (*theirs, num_layers)]
