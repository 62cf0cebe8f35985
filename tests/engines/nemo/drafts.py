"""In NeMo AutoModel's environment: its drafts, exported, compute what NeMo's own network computes.

Usage: ``PYTHON -m tests.engines.nemo.drafts CHECKPOINT FOLDER``: NeMo's checkpoint of a
trained draft, and where to write.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from nemo_automodel.components.speculative.eagle.draft_llama import LlamaEagle3DraftModel
from torch import Tensor
from transformers import LlamaConfig

from trainer_client.drafts.export import read_config, read_draft, read_tensors
from trainer_client.drafts.lint import check_draft
from trainer_client.drafts.rewriting import rewrite_draft
from trainer_client.eagle3.draft import Eagle3Draft, TTTCache

DEPTHS, TOKENS = 3, 24


def fresh(trained: Path, folder: Path, **switches: bool) -> Path:
    """An untrained draft of NeMo's, as large as a trained one, in a checkpoint."""
    config = LlamaConfig(**(read_config(trained) | switches))
    torch.manual_seed(0)
    made = LlamaEagle3DraftModel(config)
    made.set_vocab_mapping(torch.randperm(config.vocab_size)[: config.draft_vocab_size])
    for name, parameter in made.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    made.save_pretrained(folder / "model" / "consolidated")
    return folder


def theirs(draft: Any, ids: Tensor, aux: Tensor, attention: Tensor) -> Iterator[Tensor]:
    """Logits [B, T, D] of each depth."""
    hidden, cache = draft.project_hidden_states(aux), [[], []]
    for _ in range(DEPTHS):
        hidden = draft(ids, hidden, attention, cache_hidden=cache)
        yield draft.compute_logits(hidden)


def ours(draft: Eagle3Draft, ids: Tensor, aux: Tensor, attention: Tensor) -> Iterator[Tensor]:
    """The same of ours."""
    hidden, cache = draft.fuse(aux), TTTCache()
    for _ in range(DEPTHS):
        hidden = draft.step(ids, hidden, cache, attention)
        yield draft.logits(hidden)
        hidden = draft.fed_back(hidden, draft.norm(hidden))


def wrong(checkpoint: Path, exported: Path) -> list[str]:
    """What does not hold of a draft and its export."""
    rewrite_draft(checkpoint, exported)
    found = [f"{finding.severity}: {finding.text}" for finding in check_draft(exported)]
    network = LlamaEagle3DraftModel(LlamaConfig(**read_config(checkpoint))).float().eval()
    network.load_state_dict(read_tensors(checkpoint))
    mine = read_draft(exported)
    if not torch.equal(network.d2t, mine.d2t) or not torch.equal(network.t2d, mine.t2d):
        found.append("the draft vocabulary is another")
    config, draw = mine.config, torch.Generator().manual_seed(1)
    ids = torch.randint(0, config.vocab_size, (2, TOKENS), generator=draw)
    aux = torch.randn(2, TOKENS, 3 * config.target_hidden_size, generator=draw)
    attention = torch.ones_like(ids)
    with torch.no_grad():
        pairs = zip(
            theirs(network, ids, aux, attention), ours(mine, ids, aux, attention), strict=True
        )
        for depth, (wanted, got) in enumerate(pairs):
            off = float((got - wanted).norm() / wanted.norm())
            if not off < 1e-5:
                found.append(f"depth {depth}: logits are {off:.1e} of their norm off")
    return found


def main() -> int:
    """Print a line for each draft, and return 1 where something does not hold."""
    trained, folder = Path(sys.argv[1]), Path(sys.argv[2])
    newer = fresh(trained, folder / "newer", fc_norm=True, norm_output=True)
    failed = 0
    for name, checkpoint in (("a trained draft", trained), ("EAGLE-3.1", newer)):
        found = wrong(checkpoint, folder / f"{checkpoint.name}-exported")
        failed += bool(found)
        print(f"{'FAIL' if found else 'ok  '}  {name}, exported: {json.dumps(found)}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
