"""A target whose weights are DTensors on a gloo mesh is served like any other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tests.integration.conftest import VOCAB, Cluster, make_target, tokens
from worker.canary import prove
from worker.supervision.mapping import VocabMapping
from worker.supervision.supervision import compute_supervision
from worker.targets.contract import full_tensor
from worker.targets.foreign import ForeignTarget
from worker.targets.huggingface import HuggingFaceTarget


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class HeadOfViews(nn.Module):
    """Multiplies with the transpose of its weight, and leaves the product where it is."""

    def __init__(self, weight: torch.Tensor, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.weight = nn.Parameter(distribute_tensor(weight, mesh, [Replicate()]))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return DTensor.from_local(hidden, self.mesh, [Replicate()]) @ self.weight.t()


def spread(model: Any, mesh: DeviceMesh, head: str) -> Any:
    rows = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    plan: dict[str, Any] = {"model.embed_tokens": rows}
    for layer in range(8):
        mlp = f"model.layers.{layer}.mlp"
        plan |= {f"{mlp}.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
        plan[f"{mlp}.down_proj"] = RowwiseParallel()
    if head == "of views":
        model.lm_head = HeadOfViews(model.lm_head.weight.detach(), mesh)
    else:
        local = head == "gathers"
        plan["lm_head"] = ColwiseParallel(output_layouts=Replicate(), use_local_output=local)
    return parallelize_module(model, mesh, plan)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("head", ["gathers", "leaves the product spread", "of views"])
def test_embeddings_head_rows_and_supervision_are_those_of_the_whole(
    cluster: Cluster, mesh: DeviceMesh, mapping: VocabMapping, head: str, wrapped: bool
) -> None:
    whole: Any = make_target()
    target: Any = HuggingFaceTarget(spread(make_target().model, mesh, head), name="tiny")
    weight = target.model.get_input_embeddings().weight
    assert isinstance(weight, DTensor)
    if wrapped:
        whole, target = ForeignTarget(whole, "whole"), ForeignTarget(target, "theirs")
    prove(target)
    cluster.worker(target, coalesce_tokens=0 if wrapped else 256)
    for encoding in ("probs", "hidden", "topk"):
        remote = cluster.trainer(mapping, encoding=encoding)
        together = [remote.generate_batch_async(*tokens(seed)) for seed in range(4)]
        for seed, batch in enumerate(together):
            wanted = compute_supervision(whole, *tokens(seed), mapping=mapping, encoding=encoding)
            for name, tensor in wanted.items():
                torch.testing.assert_close(getattr(batch.result(), name), tensor)
    assert torch.equal(remote.get_input_embeddings().weight, full_tensor(weight))
    rows = whole.model.lm_head.weight[mapping.selected_token_ids]
    assert torch.equal(remote.lm_head_rows().weight, rows)
    assert remote.model_info()["vocab_size"] == VOCAB
