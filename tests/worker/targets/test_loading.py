from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vocab import shuffled
from tests.worker.targets.tiny_models import VOCAB, make, shared, tokens
from worker.errors import TargetError
from worker.supervision.mapping import VocabMapping
from worker.supervision.supervision import compute_supervision
from worker.targets import EMBEDDED, as_target, load_factory, load_target, resolve
from worker.targets.contract import describe, shift_left
from worker.targets.fingerprint import weights_fingerprint
from worker.targets.foreign import ForeignTarget
from worker.targets.huggingface import HuggingFaceTarget
from worker.targets.stub import StubTarget


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make("llama").save_pretrained(folder)
    return folder


def test_a_folder_loads_as_the_model_that_was_saved(saved: Path) -> None:
    target = load_target(str(saved))
    memory = HuggingFaceTarget(shared("llama"), name="memory")
    assert torch.equal(target.forward(*tokens()).logits, memory.forward(*tokens()).logits)
    assert target.fingerprint == memory.fingerprint
    assert target.name == str(saved)
    assert target.tokenizer == ""  # none was saved


def test_fingerprint_is_equal_in_every_process() -> None:
    model = torch.nn.Linear(5, 3)
    model.weight.data = torch.arange(15.0).reshape(3, 5)
    model.bias.data = torch.arange(3.0)
    assert weights_fingerprint(model) == "wdae7aa15959cb44d27ce4b426f1301b9"


def test_dtype_and_aux_layers_are_as_asked(saved: Path) -> None:
    target = load_target(str(saved), dtype="bfloat16", aux_layer_ids=[2, 4, 6])
    assert target.dtype == torch.bfloat16
    assert target.aux_layer_ids == (2, 4, 6)
    facts = describe(target)
    assert (facts.dtype, facts.aux_layer_ids) == ("bfloat16", (2, 4, 6))


def test_a_multimodal_folder_loads(tmp_path: Path) -> None:
    shared("llava").save_pretrained(tmp_path)
    assert type(load_target(str(tmp_path)).model).__name__ == "LlavaForConditionalGeneration"


def test_embedded_is_the_shipped_folder() -> None:
    assert resolve("embedded") == str(EMBEDDED)
    assert resolve("some/model") == "some/model"


@pytest.mark.skipif(not (EMBEDDED / "config.json").exists(), reason="not made yet")
def test_embedded_loads_in_float32_with_its_tokenizer() -> None:
    target = load_target("embedded")
    assert target.dtype == torch.float32
    assert target.name == "embedded"
    assert target.tokenizer == "embedded"  # wherever this is installed
    assert target.encodings == ("probs", "hidden", "topk")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing-here", "~/nothing"])
def test_a_path_without_a_model_is_named(name: str) -> None:
    with pytest.raises(TargetError, match=r"no model at .* Hugging Face model id, or 'embedded'"):
        load_target(name)


def test_a_folder_that_is_no_model_says_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(TargetError, match=r"cannot load target .*; give a folder") as caught:
        load_target(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_id_that_cannot_be_had_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TargetError, match="cannot load target 'nobody/nothing'") as caught:
        load_target("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_code_that_comes_with_a_model_needs_a_word(tmp_path: Path) -> None:
    """Not even its import runs without the flag, and with it it does."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "odd", "auto_map": {"AutoConfig": "odd_config.OddConfig"}})
    )
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nraise ImportError('that was all')\n"
    (tmp_path / "odd_config.py").write_text(code)
    with pytest.raises(TargetError, match=r"code of its own.*say --trust-remote-code"):
        load_target(str(tmp_path))
    assert not ran.exists()
    with pytest.raises(TargetError, match="that was all"):
        load_target(str(tmp_path), trust_remote_code=True)
    assert ran.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu9"}, "unknown device 'tpu9'"),
        ({"dtype": "float8"}, "unknown dtype 'float8'; choose float32, bfloat16, float16 or auto"),
        ({"aux_layer_ids": (1, 1, 2)}, "two or more distinct layers"),
    ],
)
def test_a_bad_option_is_named(saved: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        load_target(str(saved), **options)


def test_a_missing_gpu_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TargetError, match="sees no CUDA device; choose cpu"):
        load_target(str(saved), device="cuda:1")


# -- factories --------------------------------------------------------------------------------


class Seed:
    """As little as the co-located contract asks for."""

    def __init__(self) -> None:
        self.model = shared("llama")
        self.aux_layer_ids = [1, 3, 4]

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def generate_batch(self, *, input_ids: Any, attention_mask: Any, loss_mask: Any) -> Any:
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True
        )
        return SimpleNamespace(
            aux_hidden_states=torch.cat([outputs.hidden_states[i + 1] for i in (1, 3, 4)], dim=-1),
            logits=shift_left(outputs.logits),
            input_ids=shift_left(input_ids),
            loss_mask=shift_left(loss_mask),
        )


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("user_targets")
    monkeypatch.setitem(sys.modules, "user_targets", module)
    return module


def test_a_factorys_target_gives_the_same_supervision_and_only_probs(user_module: Any) -> None:
    user_module.make = Seed
    target = load_factory("user_targets:make")
    facts = describe(target, "mine")
    assert facts.encodings == ("probs", "topk")
    assert (facts.model, facts.vocab_size, facts.aux_layer_ids) == ("mine", VOCAB, (1, 3, 4))
    ours = HuggingFaceTarget(shared("llama"), name="ours")
    assert facts.fingerprint == ours.fingerprint
    mapping = VocabMapping(shuffled(torch.arange(0, VOCAB, 2)), VOCAB)
    wanted = compute_supervision(ours, *tokens(), mapping=mapping, encoding="probs")
    got = compute_supervision(target, *tokens(), mapping=mapping, encoding="probs")
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


def test_a_factory_may_make_one_of_our_targets(user_module: Any) -> None:
    user_module.stub = StubTarget()
    user_module.make = lambda: user_module.stub
    assert load_factory("user_targets:make") is user_module.stub


class Sharded:
    """Stands for a DTensor: knows its parts, gives the whole when asked."""

    def __init__(self, whole: torch.Tensor) -> None:
        self.whole, self.shape = whole, whole.shape

    def full_tensor(self) -> torch.Tensor:
        return self.whole


def test_sharded_logits_are_gathered() -> None:
    class Parallel(Seed):
        def generate_batch(self, **tensors: Any) -> Any:
            batch = super().generate_batch(**tensors)
            batch.logits = Sharded(batch.logits)
            return batch

    mapping = VocabMapping(shuffled(torch.arange(0, VOCAB, 2)), VOCAB)
    whole, sharded = (
        compute_supervision(as_target(made), *tokens(), mapping=mapping, encoding="probs")
        for made in (Seed(), Parallel())
    )
    assert torch.equal(sharded["target_probs"], whole["target_probs"])


def test_a_target_that_mixes_batches_up_is_caught() -> None:
    class Mixed(Seed):
        def generate_batch(self, **tensors: Any) -> Any:
            return super().generate_batch(**(tensors | {"input_ids": tensors["input_ids"] - 1}))

    with pytest.raises(TargetError, match="a batch of other token ids than it was given"):
        as_target(Mixed()).forward(*tokens())


def test_a_foreign_target_is_called_by_one_thread_at_a_time() -> None:
    stub = StubTarget(vocab_size=VOCAB)
    target = ForeignTarget(stub, "theirs")
    assert target.encodings  # found by a call, once
    before = stub.calls
    caller = threading.Thread(target=target.forward, args=tokens())
    with target._one_call:  # as if another thread's call were under way
        caller.start()
        caller.join(0.05)
        assert stub.calls == before
    caller.join()
    assert stub.calls == before + 1


class InAnEngine(Seed):
    """Its weights are elsewhere: the model shows a config, as NeMo AutoModel's of vLLM does."""

    def __init__(self, where: str) -> None:
        super().__init__()
        config = copy.deepcopy(self.model.config)
        config._name_or_path = where
        self._embeddings = self.model.get_input_embeddings()
        self.model = SimpleNamespace(config=config)

    def get_input_embeddings(self) -> Any:
        return self._embeddings


def test_weights_in_an_engine_are_known_by_the_files_that_they_came_from(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved, tuned = tmp_path / "moved", tmp_path / "tuned"
    shutil.copytree(saved, moved)
    shutil.copytree(saved, tuned)
    weights = load_file(tuned / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"] += 0.01  # its embeddings and its head are the same
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    prints = [as_target(InAnEngine(str(where))).fingerprint for where in (saved, moved, tuned)]
    assert prints[0] == prints[1] != prints[2]
    assert not caplog.records
    for nowhere in ("", "an/id", str(tmp_path)):
        assert as_target(InAnEngine(nowhere)).fingerprint
        assert caplog.messages == ["fingerprint_is_weak"]
        caplog.clear()


@pytest.mark.parametrize("kind", ["llama", "granite"])
def test_a_wrapper_offers_hidden_where_its_batches_and_its_head_have_it(kind: str) -> None:
    ours = HuggingFaceTarget(shared(kind), name=kind)
    theirs = ForeignTarget(ours, kind)
    assert theirs.encodings == ours.encodings  # Granite scales what its head makes
    mapping = VocabMapping(shuffled(torch.arange(0, VOCAB, 2)), VOCAB)
    for encoding in theirs.encodings:
        made = compute_supervision(theirs, *tokens(), mapping=mapping, encoding=encoding)
        wanted = compute_supervision(ours, *tokens(), mapping=mapping, encoding=encoding)
        for name, tensor in wanted.items():  # behind the last slot is nothing to learn
            assert torch.equal(made[name][:, :-1], tensor[:, :-1]), name
    ours.close()


def test_states_of_concurrent_calls_are_not_mixed_up() -> None:
    """A wrapper that keeps its states in itself, as hooks do: our lock is what keeps them apart."""

    class Keeping(Seed):
        kept: Any = None

        def generate_batch(self, **tensors: Any) -> Any:
            made = super().generate_batch(**tensors)
            self.kept = made.aux_hidden_states
            time.sleep(0.002)  # another call would put its own there meanwhile
            made.aux_hidden_states = self.kept
            return made

    target = as_target(Keeping())
    batches = [tokens(seed=seed) for seed in range(8)]
    expected = [target.forward(*batch).aux_hidden_states for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda batch: target.forward(*batch).aux_hidden_states, batches))
    for ours, theirs in zip(made, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_target_whose_tensors_have_other_shapes_is_caught() -> None:
    class Narrow(Seed):
        def generate_batch(self, **tensors: Any) -> Any:
            batch = super().generate_batch(**tensors)
            batch.aux_hidden_states = batch.aux_hidden_states[..., :64]
            return batch

    wanted = r"gave \(2, 12, 64\) for aux_hidden_states, its contract says \(2, 12, 96\)"
    with pytest.raises(TargetError, match=wanted):
        as_target(Narrow()).forward(*tokens())


def test_a_factory_is_given_what_was_said_and_nothing_else(user_module: Any) -> None:
    got: dict[str, Any] = {}

    def make(depth: int, device: str = "cpu", aux_layer_ids: Any = None) -> Any:
        got.update(depth=depth, device=device, aux_layer_ids=aux_layer_ids)
        return Seed()

    user_module.make = make
    options = {"device": "", "dtype": None, "aux_layer_ids": (1, 3, 4)}
    load_factory("user_targets:make", arguments={"depth": 3}, options=options)
    assert got == {"depth": 3, "device": "cpu", "aux_layer_ids": (1, 3, 4)}
    with pytest.raises(TargetError, match=r"cannot be called with nothing: missing .*'depth'"):
        load_factory("user_targets:make")
    with pytest.raises(TargetError, match=r"dtype='bfloat16': got an unexpected .*'dtype'"):
        load_factory("user_targets:make", arguments={"depth": 3}, options={"dtype": "bfloat16"})


def test_a_factory_may_lie_in_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here_only.py").write_text(
        "from tests.worker.targets.test_loading import Seed as make\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert load_factory("here_only:make").name == "make"


def test_missing_members_are_all_named(user_module: Any) -> None:
    user_module.make = lambda: SimpleNamespace(model=SimpleNamespace(), aux_layer_ids=[1, 2, 3])
    wanted = "it has no generate_batch, get_input_embeddings; the contract is"
    with pytest.raises(TargetError, match=wanted):
        load_factory("user_targets:make")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("user_targets", "'package.module:callable', got 'user_targets'"),
        ("user_targets:", "'package.module:callable'"),
        ("no_such_package.x:make", "cannot import no_such_package.x .* PYTHONPATH"),
        ("user_targets:absent", "absent is not in user_targets"),
        ("user_targets:number", "number is not callable"),
    ],
)
def test_a_bad_reference_is_named(user_module: Any, reference: str, message: str) -> None:
    user_module.number = 3
    with pytest.raises(TargetError, match=message):
        load_factory(reference)


def test_importing_the_packages_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, worker, worker.targets, trainer_client;"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
