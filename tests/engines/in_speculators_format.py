"""Runs in the engines' environment: speculators loads a draft that is in its format.

Exits 1 unless every tensor of the file is a weight of its model, to the bit, and the model has no
other weights but those of its verifier.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from speculators import SpeculatorModel


def main(draft: str) -> None:
    model = SpeculatorModel.from_pretrained(draft)
    weights, written = model.state_dict(), load_file(Path(draft) / "model.safetensors")
    strange = [name for name in written if name not in weights]
    strange += [name for name in weights.keys() - written if not name.startswith("verifier_")]
    changed = [n for n in written if n in weights and not torch.equal(weights[n], written[n])]
    if strange or changed:
        sys.exit(f"not of both: {strange}; changed: {changed}")
    print(f"{len(written)} tensors of {type(model).__name__}")


if __name__ == "__main__":
    main(*sys.argv[1:])
