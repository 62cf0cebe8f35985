"""Our drafts in speculators' format. `make test-engines` loads one with speculators itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.trainer_client.drafts.test_export import INFO, LAYER_IDS, make_draft
from tests.vocab import shuffled
from trainer_client.commands.export import export
from trainer_client.drafts.export import read_draft, write_draft
from trainer_client.drafts.layers import aux_layer_ids
from trainer_client.drafts.lint import check_draft

VERIFIER = {"name_or_path": "org/model", "architectures": ["LlamaForCausalLM"]}


def test_a_draft_comes_back_out_of_speculators_format(tmp_path: Path) -> None:
    info = {**INFO, "config": {**INFO["config"], "architectures": ["LlamaForCausalLM"]}}
    made = make_draft(24, shuffled(torch.arange(60))[:24])
    write_draft(made, tmp_path / "draft", target_info=info, verifier="org/model")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config["speculators_config"]["verifier"] == VERIFIER
    assert config["transformer_layer_config"]["model_type"] == "llama"
    assert config[LAYER_IDS] == [2, 6, 9]  # as engines count them
    names = load_file(tmp_path / "draft" / "model.safetensors")
    assert not [name for name in names if name.startswith("midlayer.")]
    again = read_draft(tmp_path / "draft")
    assert again.config == made.config
    assert aux_layer_ids(tmp_path / "draft") == (1, 5, 8)
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    (finding,) = check_draft(tmp_path / "draft")
    assert finding.severity == "warning"
    assert "in speculators' format: vLLM loads it, SGLang reads nothing of it" in finding.text


@pytest.mark.parametrize("half", [["--format", "speculators"], ["--verifier", "org/model"]])
def test_the_format_and_the_verifier_go_together(tmp_path: Path, half: list[str]) -> None:
    arguments = ["--checkpoint", str(tmp_path), "--output", str(tmp_path / "draft"), *half]
    done = CliRunner().invoke(export, arguments)
    assert done.exit_code == 2
    assert "--format speculators and --verifier TARGET go together" in done.output
