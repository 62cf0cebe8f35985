"""Targets whose weights and outputs are spread over processes, as tensor parallelism does it.

Every process runs the same answerer on the same requests; what it gathers is the whole.
"""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from broker.peer.tensors import from_packet
from broker.protocol import Limits, Packet, encode
from broker.protocol import messages as m
from tests.vocab import shuffled
from tests.worker.supervision.requests import generate, offer
from tests.worker.targets.tiny_models import VOCAB, shared
from worker.answers import Answerer
from worker.supervision.mapping import VocabMapping
from worker.targets import as_target
from worker.targets.contract import Target, describe, shift_left
from worker.targets.huggingface import HuggingFaceTarget

MAPPING = VocabMapping(shuffled(torch.arange(0, VOCAB, 2)), VOCAB)
IDS = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
LAYERS = (1, 3, 4)
_PATIENCE = timedelta(seconds=60)


def whole_model() -> Any:
    """A Llama whose head has a bias, so that this is spread too."""
    model = copy.deepcopy(shared("llama"))
    bias = torch.nn.Linear(model.config.hidden_size, VOCAB)
    bias.weight.data.copy_(model.lm_head.weight)
    bias.bias.data.copy_(torch.linspace(-1, 1, VOCAB))
    model.lm_head = bias
    return model.requires_grad_(False)


def spread(model: Any, mesh: DeviceMesh) -> Any:
    """Over the ranks of a mesh; logits come out as a DTensor."""
    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for number in range(model.config.num_hidden_layers):
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up"):
            plan[f"model.layers.{number}.{name}_proj"] = ColwiseParallel()
        for name in ("self_attn.o", "mlp.down"):
            plan[f"model.layers.{number}.{name}_proj"] = RowwiseParallel()
    return parallelize_module(model, mesh, plan)


class Theirs:
    """A user's target with the co-located contract, whose batches are DTensors throughout."""

    def __init__(self, model: Any, mesh: DeviceMesh) -> None:
        self.model, self.mesh = model, mesh
        self.aux_layer_ids = list(LAYERS)

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def generate_batch(self, *, input_ids: Any, attention_mask: Any, loss_mask: Any) -> Any:
        made = self.model(input_ids, attention_mask, output_hidden_states=True)
        states = [made.hidden_states[layer + 1] for layer in LAYERS]
        return SimpleNamespace(
            aux_hidden_states=self._spread(torch.cat(states, dim=-1)),
            logits=shift_left(made.logits),
            input_ids=shift_left(input_ids),
            loss_mask=shift_left(loss_mask),
            last_hidden_state=self._spread(shift_left(made.hidden_states[-1])),
        )

    def _spread(self, tensor: torch.Tensor) -> Any:
        return distribute_tensor(tensor, self.mesh, [Shard(1)])


def served(target: Target) -> Answerer:
    made = Answerer(target, describe(target), "w")
    made.learn(offer(MAPPING))
    return made


def asked(operation: str, number: int) -> Packet:
    request = m.Request(
        id=m.RequestId("c", 1, number),
        operation=operation,
        model="",
        step=number,
        n_tokens=0,
        mapping_id=MAPPING.id if operation == "lm_head_rows" else "",
        encoding="",
        ttl_s=60.0,
        manifest=(),
    )
    return encode(request)


def requests() -> list[Packet]:
    wishes = ("probs", "hidden", "layers=1,4", "layers=3;states=fp8")
    supervision = [generate(at, IDS, MAPPING, encoding=wish) for at, wish in enumerate(wishes, 3)]
    return [asked("input_embeddings", 1), asked("lm_head_rows", 2), *supervision]


def assert_same(got: Packet, wanted: Packet) -> None:
    """Equal but for the order of additions; a shifted target has nothing in its last slot."""
    assert not isinstance(got.message, m.Failure), got.message
    tensors = from_packet(got)
    for name, tensor in from_packet(wanted).items():
        assert type(tensors[name]) is torch.Tensor
        one, other = tensors[name].float(), tensor.float()
        if name in ("target_probs", "last_hidden_state"):
            one, other = one[:, :-1], other[:, :-1]
        near = 0.1 if name.endswith("fp8") or "scale" in name else 1e-4
        assert torch.allclose(one, other, rtol=near, atol=1e-5), name


def _rank(rank: int, world: int, meeting: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    mesh = init_device_mesh("cpu", (world,))
    whole = HuggingFaceTarget(whole_model(), name="tiny", aux_layer_ids=LAYERS)
    wanted = [served(whole).answer(packet, Limits())[0] for packet in requests()]
    ours = HuggingFaceTarget(spread(whole_model(), mesh), name="tiny", aux_layer_ids=LAYERS)
    theirs = as_target(Theirs(spread(whole_model(), mesh), mesh))
    for target in (ours, theirs):
        assert target.fingerprint == whole.fingerprint
        assert "hidden" in target.encodings
        answerer = served(target)
        for packet, right in zip(requests(), wanted, strict=True):
            assert_same(answerer.answer(packet, Limits())[0], right)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.heavy
def test_a_target_that_is_spread_serves_the_whole(tmp_path: Path) -> None:
    mp.spawn(_rank, (2, str(tmp_path / "store")), nprocs=2)
