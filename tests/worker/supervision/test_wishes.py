"""What a wish gives is what transformers' own model gives, and nothing else is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from tests.vocab import shuffled
from tests.worker.targets.tiny_models import MAKERS, SIZES, VOCAB, make, shared, tokens
from worker.errors import BadRequest, TargetError
from worker.supervision.fp8 import from_fp8, relative_error, to_fp8
from worker.supervision.mapping import VocabMapping
from worker.supervision.supervision import compute_packed, compute_supervision, input_embeddings
from worker.targets.contract import describe
from worker.targets.foreign import ForeignTarget
from worker.targets.huggingface import HuggingFaceTarget
from worker.targets.stub import StubTarget

MAPPING = VocabMapping(shuffled(torch.arange(0, VOCAB, 3)), VOCAB)


def wished(target: Any, wish: str, loss_mask: torch.Tensor | None = None) -> dict[str, Any]:
    ids, mask, ones = tokens()
    loss = ones if loss_mask is None else loss_mask
    return compute_supervision(target, ids, mask, loss, mapping=MAPPING, encoding=wish)


@pytest.mark.parametrize("kind", MAKERS)
def test_any_layers_are_those_of_the_model_bit_for_bit(kind: str) -> None:
    model = shared(kind)
    target = HuggingFaceTarget(model, name=kind)
    ids, mask, _ = tokens()
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    got = wished(target, "layers=-1,0,2,6")["states"]
    assert got.shape == (*ids.shape, 4, 32)
    for at, layer in enumerate((-1, 0, 2, 6)):
        assert torch.equal(got[:, :, at], whole.hidden_states[layer + 1]), layer
    # transformers' last of them is normed, a wish's is not
    last = wished(target, "layers=7")["states"][:, :, 0]
    assert not torch.equal(last, whole.hidden_states[8])
    if "hidden" in target.encodings:
        assert torch.equal(wished(target, "last")["last"], whole.hidden_states[8])
    target.close()


class Ran:
    """Which modules of a model have been run."""

    def __init__(self, model: Any) -> None:
        self.names: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self.names.append(name))

    def of(self, target: HuggingFaceTarget, wish: str) -> list[str]:
        self.names.clear()
        wished(target, wish)
        return list(self.names)


@pytest.fixture(scope="module")
def model() -> Any:
    return make("llama")


@pytest.fixture(scope="module")
def target(model: Any) -> HuggingFaceTarget:
    return HuggingFaceTarget(model, name="llama")


@pytest.fixture(scope="module")
def ran(model: Any, target: HuggingFaceTarget) -> Ran:
    return Ran(model)


@pytest.mark.parametrize("wish", ["last", "layers=1,7;last", "layers=1;last=fp8;at=loss"])
def test_no_head_is_run_where_nothing_asks_for_the_vocabulary(
    target: HuggingFaceTarget, ran: Ran, wish: str
) -> None:
    names = ran.of(target, wish)
    assert "model.norm" in names
    assert "lm_head" not in names
    assert "lm_head" in ran.of(target, "topk=4")


def test_a_forward_ends_behind_the_last_layer_that_is_wanted(
    target: HuggingFaceTarget, ran: Ran
) -> None:
    names = ran.of(target, "layers=1,4")
    assert [f"model.layers.{n}" in names for n in range(8)] == [True] * 5 + [False] * 3
    assert "model.norm" not in names
    assert "model.layers.0" not in ran.of(target, "layers=-1")


def test_what_a_forward_that_ended_early_leaves_is_nothing(target: HuggingFaceTarget) -> None:
    before = wished(target, "hidden")
    wished(target, "layers=2")
    for name, tensor in wished(target, "hidden").items():
        assert torch.equal(tensor, before[name]), name


def test_probabilities_are_the_softmax_over_the_mapping_and_are_not_moved(
    target: HuggingFaceTarget, model: Any
) -> None:
    ids, mask, _ = tokens()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    expected = torch.softmax(logits[..., MAPPING.selected_token_ids].float(), -1)
    assert torch.equal(wished(target, "layers=1;probs")["probs"], expected)
    top = wished(target, "topk=5")
    values, ids_ = expected.topk(5)
    torch.testing.assert_close(top["topk_log_probs"].exp(), values)
    assert torch.equal(top["topk_ids"].long(), ids_)
    torch.testing.assert_close(top["rest_mass"][..., 0], 1 - values.sum(-1))
    assert list(wished(target, "topk=9999")["topk_ids"].shape)[-1] == MAPPING.draft_vocab_size


@pytest.mark.parametrize("rows", [(0, 12), (3, 7), (11, 12)])
@pytest.mark.parametrize("wish", ["layers=1,4;last", "last;probs", "last;topk=3"])
def test_loss_and_rows_choose_the_very_rows_of_the_whole(
    target: HuggingFaceTarget, wish: str, rows: tuple[int, int]
) -> None:
    loss_mask = torch.zeros(2, 12, dtype=torch.int64)
    loss_mask[0, 2:9] = loss_mask[1, [0, 5, 11]] = 1
    whole = wished(target, wish)
    sliced = wished(target, f"{wish};rows={rows[0]}-{rows[1]}")
    chosen = wished(target, f"{wish};at=loss;rows={rows[0]}-{rows[1]}", loss_mask)
    mask = loss_mask[:, slice(*rows)].bool()
    for name, tensor in whole.items():
        part = tensor[:, slice(*rows)]
        assert torch.equal(sliced[name], part), name
        assert torch.equal(chosen[name], part if name == "states" else part[mask]), name
    assert {len(t) for name, t in chosen.items() if name != "states"} == {int(mask.sum())}


def test_no_position_with_loss_is_no_row(target: HuggingFaceTarget) -> None:
    nothing = wished(target, "last=fp8;topk=3;at=loss", torch.zeros(2, 12, dtype=torch.bool))
    assert {name: len(tensor) for name, tensor in nothing.items()} == dict.fromkeys(nothing, 0)


LENGTHS = (5, 1, 12, 7)


@pytest.mark.parametrize(
    "wish",
    [
        "layers=1,4,7;last",
        "layers=2;states=fp8;last=fp8;at=loss",
        "last;probs;at=loss",
        "topk=4",
        "hidden",
        "probs",
    ],
)
@pytest.mark.parametrize("rows", [None, (0, 25), (4, 9), (6, 7), (17, 25)])
def test_packed_documents_have_the_bits_of_each_alone(
    target: HuggingFaceTarget, wish: str, rows: tuple[int, int] | None
) -> None:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCAB, (sum(LENGTHS),), generator=draw)
    loss_mask = torch.randint(0, 2, ids.shape, generator=draw)
    # each alone, whole: [T, ...] in one row behind another
    alone: dict[str, list[torch.Tensor]] = {}
    plain = wish.replace(";at=loss", "")
    for part, mask in zip(ids.split(LENGTHS), loss_mask.split(LENGTHS), strict=True):
        one = (part[None], torch.ones_like(part)[None], mask[None])
        for name, tensor in compute_supervision(
            target, *one, mapping=MAPPING, encoding=plain
        ).items():
            alone.setdefault(name, []).append(tensor[0])
    first, end = rows or (0, len(ids))
    asked = wish if rows is None else f"{wish};rows={first}-{end}"
    got = compute_packed(
        target, ids, torch.tensor(LENGTHS), loss_mask, mapping=MAPPING, encoding=asked
    )
    assert list(got) == list(alone)
    for name, tensors in alone.items():
        expected = torch.cat(tensors)[first:end]
        if "at=loss" in wish and not name.startswith("states"):
            expected = expected[loss_mask[first:end].bool()]
        assert torch.equal(got[name].view(torch.uint8), expected.view(torch.uint8)), name


def test_documents_outside_the_rows_are_not_run() -> None:
    stub = StubTarget(vocab_size=VOCAB)
    ids = torch.arange(25)
    compute_packed(stub, ids, torch.tensor(LENGTHS), encoding="last;rows=6-18")
    assert stub.calls == 1


# -- fp8 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_is_within_its_three_bits_whatever_the_scale_and_the_outliers(
    dtype: torch.dtype,
) -> None:
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(4, 7, 3, 64, generator=draw)
    states *= torch.tensor([1e-3, 1.0, 50.0]).view(3, 1)
    states[0, 0, 1, 5] = 2000.0  # of one layer: the others of that token are as they were
    states = states.to(dtype)
    values, scale = to_fp8(states)
    assert values.dtype == torch.float8_e4m3fn
    assert values.nbytes + scale.nbytes == states.numel() + 4 * 4 * 7 * 3
    back = from_fp8(values, scale, dtype)
    assert back.dtype == dtype
    assert 0.01 < relative_error(states, values, scale) < 0.04
    rows = (back.float() - states.float()).norm(dim=-1) / states.float().norm(dim=-1)
    assert rows.max() < 0.06
    assert torch.equal(back[0, 0, 1, 5], states[0, 0, 1, 5])


def test_zeros_stay_zeros_and_the_largest_number_survives() -> None:
    states = torch.zeros(2, 8)
    states[1, 3] = torch.finfo(torch.float32).max
    values, scale = to_fp8(states)
    assert torch.isfinite(scale).all()
    back = from_fp8(values, scale, torch.float32)
    assert not back[0].any()
    torch.testing.assert_close(back[1, 3], states[1, 3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_shows_in_the_scale(value: float) -> None:
    states = torch.ones(3, 8)
    states[1, 2] = value
    _, scale = to_fp8(states)
    assert torch.isfinite(scale).tolist() == [True, False, True]


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ("layers=8", "layers 8 are asked for, and target 'llama' with its 8 layers gives -1 to 7"),
        ("layers=3,1", "write layers=1,3"),
        ("fp16", "is no wish of supervision"),
    ],
)
def test_what_a_target_does_not_have_is_refused(
    target: HuggingFaceTarget, wish: str, says: str
) -> None:
    with pytest.raises(BadRequest, match=says):
        wished(target, wish)


def test_a_vocabulary_is_needed_only_where_the_wish_is_over_one(target: HuggingFaceTarget) -> None:
    compute_supervision(target, *tokens(), encoding="layers=1;last")
    for wish in ("probs;at=loss", "topk=3", "hidden"):
        with pytest.raises(BadRequest, match="is over a vocab mapping, and none was named"):
            compute_supervision(target, *tokens(), encoding=wish)


def test_a_target_that_changes_its_logits_gives_layers_and_no_last_state() -> None:
    target = HuggingFaceTarget(shared("gemma2"), name="gemma2")
    assert wished(target, "layers=1,2;probs")["states"].shape == (2, 12, 2, 32)
    with pytest.raises(BadRequest, match="soft-capping or scaling"):
        wished(target, "layers=1,2;last")


def test_a_target_of_others_gives_its_own_layers_and_no_others() -> None:
    theirs = ForeignTarget(StubTarget(vocab_size=VOCAB), "theirs")
    own = theirs.aux_layer_ids
    states = wished(theirs, f"layers={own[0]},{own[2]}")["states"]
    assert torch.equal(
        states, wished(StubTarget(vocab_size=VOCAB), f"layers={own[0]},{own[2]}")["states"]
    )
    with pytest.raises(BadRequest, match="layers 0 are asked for, and target 'theirs'"):
        wished(theirs, "layers=0")
    with pytest.raises(BadRequest, match="the first position is gone"):
        wished(theirs, f"layers={own[0]};topk=3")


def test_states_of_four_dimensions_are_refused_at_the_start() -> None:
    config = hf.Gemma3nTextConfig(
        **SIZES,
        head_dim=8,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        num_kv_shared_layers=2,
        layer_types=["full_attention"] * 8,
        activation_sparsity_pattern=[0.0] * 8,
    )
    with pytest.raises(TargetError, match=r"gives states \(4, 1, 8, 32\) where \(1, 8, 32\)"):
        HuggingFaceTarget(hf.Gemma3nForCausalLM(config), name="gemma3n")


def test_layers_that_text_does_not_run_are_not_offered_and_rows_for_images_are_cut() -> None:
    config = hf.MllamaTextConfig(**SIZES, cross_attention_layers=[3, 6])
    with pytest.raises(TargetError, match=r"layer 3 of .* is not run .* -1, 0, 1, 2, 4, 5, 7"):
        HuggingFaceTarget(hf.MllamaForCausalLM(config), name="mllama")
    model = hf.MllamaForCausalLM(config)
    target = HuggingFaceTarget(model, name="mllama", aux_layer_ids=(1, 4, 5))
    assert describe(target).layers == (-1, 0, 1, 2, 4, 5, 7)
    assert model.get_input_embeddings().weight.shape == (VOCAB + 8, 32)
    assert input_embeddings(target)["weight"].shape == (VOCAB, 32)
    assert wished(target, "layers=1,7;last")["states"].shape == (2, 12, 2, 32)
    with pytest.raises(BadRequest, match="layers 3 are asked for"):
        wished(target, "layers=1,3")


@pytest.fixture(scope="module")
def wide() -> HuggingFaceTarget:
    """A target of 8 layers as wide as one of 8B, and of little else."""
    config = hf.LlamaConfig(
        hidden_size=4096,
        vocab_size=64,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        intermediate_size=4,
    )
    return HuggingFaceTarget(hf.LlamaForCausalLM(config).to(torch.bfloat16), name="wide")


@pytest.mark.parametrize(
    ("layers", "last", "in_bf16", "in_fp8", "mixed"),
    [
        ("1,3,4", True, 32_768, 16_400, 20_492),  # EAGLE-3, EAGLE-3.1, P-EAGLE
        ("1,2,3,4,5", True, 49_152, 24_600, 28_692),  # EAGLE-3 of 5 layers, DSpark, DFlash with KL
        ("1,2,3,4,5", False, 40_960, 20_500, 20_500),  # DFlash
        ("1,2,3,4,5,6", True, 57_344, 28_700, 32_792),  # Kimi's DSpark
        ("", True, 8_192, 4_100, 8_192),  # MTP
    ],
)
def test_a_reply_has_so_many_bytes_a_token_as_its_family_needs(
    wide: HuggingFaceTarget, layers: str, last: bool, in_bf16: int, in_fp8: int, mixed: int
) -> None:
    states = f"layers={layers}" if layers else ""
    wishes = {
        (states, "last" if last else ""): in_bf16,
        (states, "last=fp8" if last else "", "states=fp8" if layers else ""): in_fp8,
        (states, "last" if last else "", "states=fp8" if layers else ""): mixed,
    }
    ids = torch.arange(24).view(2, 12)
    ones = torch.ones_like(ids)
    for parts, wanted in wishes.items():
        wish = ";".join(filter(None, parts))
        made = compute_supervision(wide, ids, ones, ones, encoding=wish)
        assert sum(tensor.nbytes for tensor in made.values()) == wanted * ids.numel(), wish
