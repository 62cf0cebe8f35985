"""Drafts of other trainers become drafts that engines load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from tests.trainer_client.drafts.test_export import INFO, LAYER_IDS, make_draft
from tests.trainer_client.drafts.test_variants import as_speculators, change
from tests.vocab import shuffled
from trainer_client.commands.export import export
from trainer_client.drafts.export import read_draft, write_draft
from trainer_client.drafts.layers import aux_layer_ids
from trainer_client.drafts.lint import check_draft
from trainer_client.drafts.nemo import TARGET_FILE
from trainer_client.drafts.rewriting import rewrite_draft
from trainer_client.errors import ExportError

IDS = shuffled(torch.arange(60))[:24]
#: of a target of 12 layers, as NeMo chooses them
DEFAULT = (1, 5, 8)


def nemo_checkpoint(checkpoint: Path, seed: int = 0, **config: Any) -> Path:
    """As NeMo AutoModel 0.7 writes it: the target's config, and weights of two dtypes."""
    draft = checkpoint / "model" / "consolidated"
    write_draft(made := make_draft(24, IDS), draft, target_info=INFO)
    tensors = {}
    for name, tensor in made.state_dict().items():
        tensor = tensor + seed if name == "fc.weight" else tensor
        where = name.replace("midlayer.", "layers.0.")
        own = name in ("d2t", "t2d", "lm_head.weight")
        half = name.startswith("midlayer.mlp") or name == "embed_tokens.weight"
        tensors[where if own else f"model.{where}"] = tensor.half() if half else tensor.clone()
    (draft / "model.safetensors").unlink()
    save_file(tensors, draft / "model-00001-of-00001.safetensors")
    path = draft / "config.json"
    said = json.loads(path.read_text())
    for name in ("eagle_config", LAYER_IDS, "num_aux_hidden_states", "trained_with"):
        del said[name]
    for name in ("rope_theta", "rope_scaling", "norm_before_fc", "norm_before_residual"):
        del said[name]
    said |= {"architectures": ["LlamaEagle3DraftModel"], "num_hidden_layers": 12}
    said |= {"layer_types": ["sliding_attention"] * 12, "sliding_window": 8}
    path.write_text(json.dumps(said | config))
    return checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Of NeMo's, with three checkpoints; the newest is not the last by name."""
    places = tmp_path / "run" / "checkpoints"
    for seed, name in enumerate(("epoch_0_step_20", "epoch_1_step_100", "epoch_0_step_9")):
        nemo_checkpoint(places / name, seed)
    (places / "LATEST").symlink_to("epoch_1_step_100")
    return tmp_path / "run"


def test_nemos_newest_draft_is_written_as_engines_load_it(run: Path, tmp_path: Path) -> None:
    newest = run / "checkpoints" / "epoch_1_step_100"
    before = read_draft(newest)
    for source in (run, run / "checkpoints", newest, newest / "model" / "consolidated"):
        assert rewrite_draft(source, tmp_path / "draft") == DEFAULT
        assert not check_draft(tmp_path / "draft")
        after = read_draft(tmp_path / "draft")
        assert after.config == before.config
        assert torch.equal(after.selected_token_ids, IDS)
        for name, tensor in after.state_dict().items():
            assert torch.equal(tensor, before.state_dict()[name]), name
        assert aux_layer_ids(tmp_path / "draft") == DEFAULT
    assert torch.equal(before.fc.weight, make_draft(24, IDS).fc.weight + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_draft_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    file = next(nemo_checkpoint(tmp_path / "one").rglob("*.safetensors"))
    tensors = load_file(file)
    save_file({n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}, file)
    rewrite_draft(tmp_path / "one", tmp_path / "draft")
    written = load_file(tmp_path / "draft" / "model.safetensors")
    assert {t.dtype for t in written.values() if t.is_floating_point()} == {dtype}
    said = json.loads((tmp_path / "draft" / "config.json").read_text())["torch_dtype"]
    assert f"torch.{said}" == str(dtype)


def ours(checkpoint: Path, layers: list[int]) -> None:
    (checkpoint / TARGET_FILE).write_text(json.dumps({"aux_layer_ids": layers}))


def theirs(checkpoint: Path, layers: list[int]) -> None:
    said = f"recipe: x\nrecipe_args:\n  aux_layer_ids: {layers}\n  seq_length: 3\n"
    (checkpoint / "config.yaml").write_text(said)


@pytest.mark.parametrize("say", [ours, theirs])
def test_layers_that_lie_beside_a_draft_are_its_own(
    tmp_path: Path, say: Callable[[Path, list[int]], None]
) -> None:
    checkpoint = nemo_checkpoint(tmp_path / "one")
    say(checkpoint, [2, 3, 7])
    assert aux_layer_ids(checkpoint) == (2, 3, 7)  # what draftmq eval decodes with
    assert rewrite_draft(checkpoint, tmp_path / "draft") == (2, 3, 7)
    assert rewrite_draft(checkpoint, tmp_path / "draft", (0, 3, 7)) == (0, 3, 7)


def test_a_recipe_that_says_no_layers_has_the_default(tmp_path: Path) -> None:
    checkpoint = nemo_checkpoint(tmp_path / "one")
    (checkpoint / "config.yaml").write_text("recipe_args:\n  aux_layer_ids: null\n")
    assert aux_layer_ids(checkpoint) == DEFAULT


def test_speculators_draft_is_written_as_engines_load_it(tmp_path: Path) -> None:
    write_draft(make_draft(24, IDS), tmp_path / "theirs", target_info=INFO)
    change(tmp_path / "theirs", as_speculators)
    rewrite_draft(tmp_path / "theirs", tmp_path / "draft")
    assert not check_draft(tmp_path / "draft")
    assert aux_layer_ids(tmp_path / "draft") == DEFAULT


def no_consolidated(checkpoint: Path) -> None:
    (checkpoint / "model" / "consolidated" / "config.json").unlink()


def disagreeing(checkpoint: Path) -> None:
    ours(checkpoint, [2, 3, 7])
    theirs(checkpoint, [1, 3, 7])


def shallow(checkpoint: Path) -> None:
    path = checkpoint / "model" / "consolidated" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 4}))


def gelu(checkpoint: Path) -> None:
    path = checkpoint / "model" / "consolidated" / "config.json"
    said = json.loads(path.read_text()) | {"hidden_activation": "gelu_pytorch_tanh"}
    del said["hidden_act"]
    path.write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (no_consolidated, r"lie in shards; run its model/consolidate.sh"),
        (disagreeing, r"\[2, 3, 7\] in .*json and \[1, 3, 7\] in .*yaml; say which by --aux-lay"),
        (shallow, r"not said \(the target has 4 layers, too few .*say --aux-layers"),
        (gelu, r"another kind of EAGLE-3 draft: hidden_act=gelu_pytorch_tanh"),
        (lambda at: ours(at, [1, 2]), r"reads 3 layers, and \[1, 2\] are 2"),
        (lambda at: (at / "config.yaml").write_text("a: ["), "beside .* cannot be read: "),
        (lambda at: (at / TARGET_FILE).write_text("[]"), "beside .* cannot be read: "),
    ],
)
def test_what_cannot_be_written_anew_is_said(
    tmp_path: Path, fault: Callable[[Path], None], says: str
) -> None:
    fault(nemo_checkpoint(tmp_path / "one"))
    with pytest.raises(ExportError, match=says):
        rewrite_draft(tmp_path / "one", tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


def test_a_draft_in_the_engines_layout_and_one_in_its_own_place_are_refused(tmp_path: Path) -> None:
    write_draft(make_draft(), tmp_path / "draft", target_info=INFO)
    with pytest.raises(ExportError, match="lies as engines load it; copy it"):
        rewrite_draft(tmp_path / "draft", tmp_path / "other")
    change(tmp_path / "draft", as_speculators)
    with pytest.raises(ExportError, match="is the draft that is read; give another directory"):
        rewrite_draft(tmp_path / "draft", tmp_path / "x" / ".." / "draft")


def test_the_command_says_which_layers_it_wrote(run: Path, tmp_path: Path) -> None:
    draft = str(tmp_path / "draft")
    done = CliRunner().invoke(export, ["--checkpoint", str(run), "--output", draft])
    assert done.exit_code == 0, done.output
    assert "reads the target's layers 1,5,8" in done.output
    assert f"0 findings in {draft}" in done.output
    unsorted = ["--checkpoint", str(run), "--output", draft, "--aux-layers", "8,1,5"]
    refused = CliRunner().invoke(export, unsorted)
    assert "do not ascend" in refused.output
    assert refused.exit_code != 0
