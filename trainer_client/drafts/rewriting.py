"""Drafts that other trainers wrote, in the layout that vLLM and SGLang load."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from trainer_client.drafts.export import (
    draft_folder,
    read_config,
    read_draft,
    read_tensors,
    write_draft,
)
from trainer_client.drafts.kinds import kind_of, plain_config
from trainer_client.drafts.layers import aux_layer_ids
from trainer_client.errors import ExportError


def rewrite_draft(
    source: Path, output: Path, aux_layers: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Write NeMo AutoModel's or speculators' EAGLE-3 draft anew; return the layers that it reads.

    ``source`` is a draft, or NeMo's checkpoint or run with one inside. ``aux_layers`` are said
    where the draft does not say them. Raises :class:`ExportError`; ``source`` is left as it was.
    """
    where, config, tensors = draft_folder(source), read_config(source), read_tensors(source)
    kind = kind_of(config, tensors)
    if kind.layout == "engine":
        raise ExportError(f"{where} is an {kind} and lies as engines load it; copy it as it is")
    layers = tuple(aux_layers or aux_layer_ids(source) or ())
    if not layers:
        raise ExportError(f"{where} does not say which layers it reads; say --aux-layers I,J,K")
    draft = read_draft(where)
    count = draft.config.num_aux_hidden_states
    if len(layers) != count:
        raise ExportError(f"{where} reads {count} layers, and {list(layers)} are {len(layers)}")
    if output.resolve() == where.resolve():
        raise ExportError(f"{output} is the draft that is read; give another directory")
    floats = [each.dtype for each in tensors.values() if each.dtype.is_floating_point]
    draft = draft.to(functools.reduce(torch.promote_types, floats))
    facts = {"config": plain_config(config), "aux_layer_ids": layers}
    write_draft(draft, output, target_info=facts)
    return layers
