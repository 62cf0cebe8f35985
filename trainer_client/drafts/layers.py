"""Which layers of its target a draft on disk reads."""

from __future__ import annotations

from pathlib import Path

from trainer_client.drafts import nemo
from trainer_client.drafts.export import draft_folder, read_config
from trainer_client.errors import ExportError


def aux_layer_ids(draft: Path) -> tuple[int, ...] | None:
    """The layers whose outputs a draft reads, as its config says, or what NeMo AutoModel has put
    beside it; None where nothing does.

    Raises :class:`ExportError` for a draft whose settings ask for another network than ours.
    """
    config = read_config(draft)
    if nemo.is_nemos(config):
        return nemo.aux_layer_ids(draft_folder(draft), config)
    eagle = config.get("eagle_config") or {}
    if any(each.get("use_aux_hidden_state") is False for each in (config, eagle)):
        raise ExportError(
            f"{draft} says use_aux_hidden_state: false, so it reads the last hidden state alone; "
            "only drafts that read several layers can be decoded with here"
        )
    name = "eagle_aux_hidden_state_layer_ids"
    layers = tuple(eagle.get(name) or (index - 1 for index in config.get(name) or ())) or None
    count = (config | eagle).get("num_aux_hidden_states") or (len(layers) if layers else 3)
    if layers and count != len(layers):
        raise ExportError(
            f"{draft} says that it reads {count} hidden states, and names the layers {layers}"
        )
    return layers
