"""The embedded target as it is shipped, and the script that makes it."""

from __future__ import annotations

import lzma
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from tests.embedded_making import make as make_embedded
from tests.embedded_making.corpus import build_corpus, is_prose
from tests.embedded_making.muon import Muon, orthogonalize
from worker.targets import embedded

MAX_BYTES = 8_000_000
MAX_HELDOUT_LOSS = 3.4  # nats a token on beginnings of documents, where 3.25 was measured


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(embedded.folder()).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded.folder())


@pytest.fixture(scope="module")
def heldout_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The beginning of every held-out document that is long enough: int64 [B, 256]."""
    documents = embedded.split(embedded.documents())[1]
    ids = [tokenizer(text[:4000])["input_ids"][:256] for text in documents]
    return torch.tensor([document for document in ids if len(document) == 256])


@torch.no_grad()
def greedy(model: LlamaForCausalLM, input_ids: Tensor, new_tokens: int) -> Tensor:
    return model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new_tokens,
        do_sample=False,
    )


def test_all_files_together_are_small_enough_to_ship() -> None:
    files = [path for path in embedded.folder().iterdir() if path.is_file()]
    assert {"LICENSE", "README.md", "config.json", "corpus.txt.xz", "generation_config.json"} <= {
        path.name for path in files
    }
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES


def test_reading_the_corpus_does_not_import_torch() -> None:
    program = (
        "import sys; from worker.targets import embedded; embedded.heldout();"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_heldout_and_corpus_share_no_document_and_no_paragraph() -> None:
    heldout = set(embedded.heldout().split("\n")) - {""}
    corpus = set(embedded.corpus().split("\n")) - {""}
    assert heldout
    assert not heldout & corpus
    total = len("".join(embedded.documents()))
    assert 0.03 < len("".join(heldout)) / total < 0.15


def test_weights_load_as_float32_unless_told_otherwise(model: LlamaForCausalLM) -> None:
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_vocabulary_of_model_and_tokenizer_match(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    assert (
        tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    )


@pytest.mark.parametrize(
    "text", ["A plain sentence.", "  spaces\t\n\nand lines ", "naïve, 漢字 🙂", ""]
)
def test_text_round_trips_through_the_tokenizer(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template_marks_the_assistants_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    question = {"role": "user", "content": "What does len() return?"}
    answer = {"role": "assistant", "content": "The number of items."}
    encoded = tokenizer.apply_chat_template(
        [question, answer], return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [
        token
        for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        if mask
    ]
    assert tokenizer.decode(marked) == " The number of items.<|endoftext|>"
    prompt = tokenizer.apply_chat_template(
        [question], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert encoded["input_ids"][: len(prompt)] == prompt


def test_heldout_loss_is_as_good_as_measured(model: LlamaForCausalLM, heldout_ids: Tensor) -> None:
    with torch.no_grad():
        assert make_embedded.next_token_loss(model, heldout_ids[:8]).item() < MAX_HELDOUT_LOSS


def test_rounding_the_weights_to_float16_lost_nothing(model: LlamaForCausalLM) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameter.half().float()), name
        assert parameter.abs().max() < 1000, name  # far from float16's limit of 65504


def test_later_positions_are_no_worse_than_early_ones(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    length = model.config.max_position_embeddings
    ids = torch.tensor([tokenizer(embedded.heldout()[:20_000])["input_ids"][:length]])
    with torch.no_grad():
        logits = model(ids).logits
    losses = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    assert losses[length // 2 :].mean() < losses[: length // 2].mean() + 0.5


def test_greedy_continuation_is_deterministic_and_not_one_token_over_and_over(
    model: LlamaForCausalLM, heldout_ids: Tensor
) -> None:
    prompt = heldout_ids[:1, :32]
    first, second = (greedy(model, prompt, 48) for _ in range(2))
    assert torch.equal(first, second)
    assert len(first[0, 32:].unique()) >= 8


def test_aux_layers_hold_different_content(model: LlamaForCausalLM, heldout_ids: Tensor) -> None:
    layers = model.config.num_hidden_layers
    aux_layer_ids = [1, layers // 2 - 1, layers - 4]
    assert len(set(aux_layer_ids)) == 3
    with torch.no_grad():
        hidden = model(heldout_ids[:2], output_hidden_states=True).hidden_states
    low, middle, high = (hidden[layer + 1] for layer in aux_layer_ids)  # [0] is the embedding
    for one, other in ((low, middle), (middle, high), (low, high)):
        assert torch.isfinite(one).all()
        assert (one - other).norm() / other.norm() > 0.3
        assert torch.cosine_similarity(one, other, dim=-1).mean() < 0.95


PAGE = """<div role="main"><div><p>{prose}</p><pre>code = "is no prose"</pre></div>
<p>Too short.</p><p>x = [a] + [b] ; y == z != w | v &amp; {{1: 2}} &lt;&lt; 3 -- a code.</p></div>
<p>This paragraph stands outside the main part, with the navigation of the page.</p>"""


def test_corpus_keeps_prose_once_and_drops_the_rest(tmp_path: Path) -> None:
    shared = "This sentence occurs on both pages, and belongs to the “first” of them."
    own = "Another sentence that only this second page has in it. " * 25
    (tmp_path / "tutorial").mkdir()
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "a.html").write_text(PAGE.format(prose=shared * 20), "utf-8")
    page = PAGE.format(prose=f"{shared * 20}</p><p>{own}")
    (tmp_path / "tutorial" / "b.html").write_text(page, "utf-8")
    first = (shared * 20).replace("“", '"').replace("”", '"')
    assert build_corpus(tmp_path) == f"{first}\n\n{own.strip()}"


def test_corpus_from_a_folder_without_the_documentation_says_what_it_wants(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python3\.11-doc"):
        build_corpus(tmp_path)


def test_shipped_corpus_is_prose() -> None:
    assert all(is_prose(line) for text in embedded.documents() for line in text.split("\n"))


def test_written_model_and_tokenizer_load_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**make_embedded.ARCHITECTURE | {"num_hidden_layers": 2}))
    model.half().float()
    model.config.num_hidden_layers = 2
    make_embedded.write_model(model, tmp_path)
    make_embedded.write_tokenizer(make_embedded.train_tokenizer(["some text"] * 3), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert AutoTokenizer.from_pretrained(tmp_path).decode([0]) == make_embedded.END_OF_TEXT


def test_schedule_warms_up_and_ends_near_zero() -> None:
    rates = [make_embedded.schedule(step, 400) for step in range(400)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(1.0)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.01


def test_batches_repeat_with_the_seed_and_lengthen_at_the_end() -> None:
    stream = torch.arange(5000)
    first, second = (
        list(make_embedded.batches(stream, 20, torch.Generator().manual_seed(1))) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert {batch.numel() for batch in first} == {make_embedded.TOKENS_PER_STEP}
    assert [batch.shape[1] for batch in first] == [256] * 18 + [1024] * 2
    assert all(torch.equal(row.diff(), torch.ones_like(row[1:])) for row in first[0])


@pytest.mark.parametrize("shape", [(3, 16, 64), (3, 64, 16), (2, 32, 32)])
def test_muon_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    singular_values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert singular_values.min() > 0.3
    assert singular_values.max() < 1.5


def test_muon_fits_a_linear_map() -> None:
    torch.manual_seed(0)
    wanted, layer = torch.randn(8, 8), torch.nn.Linear(8, 8, bias=False)
    optimizer = Muon(layer.parameters(), lr=0.05)
    x = torch.randn(64, 8)
    losses = []
    for _ in range(200):
        loss = (layer(x) - x @ wanted.T).pow(2).mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.02 * losses[0]


def test_corpus_file_is_one_document_between_empty_lines() -> None:
    packed = (embedded.folder() / "corpus.txt.xz").read_bytes()
    assert lzma.decompress(packed).decode() == "\n\n".join(embedded.documents())
