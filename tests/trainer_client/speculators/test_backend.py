"""speculators' samples from our workers; with the real package: ``make test-engines``."""

from __future__ import annotations

import argparse
import importlib
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.integration.conftest import VOCAB, Cluster, cluster, make_target, target
from tests.trainer_client.speculators import standin
from trainer_client.speculators.layers import columns, default_layers, target_layers, wish_for
from worker.supervision.supervision import compute_supervision
from worker.targets.huggingface import HuggingFaceTarget

__all__ = ["cluster", "target"]  # fixtures

_OURS = "trainer_client.speculators.backend"


@pytest.fixture(scope="module")
def ours() -> Iterator[Any]:
    """The backend's module, beside stand-ins for what it needs."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in standin.modules().items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, _OURS, raising=False)
        yield importlib.import_module(_OURS)
        del sys.modules[_OURS]


def arguments(ours: Any, cluster: Cluster, **changes: Any) -> SimpleNamespace:
    parser = argparse.ArgumentParser()
    ours.Backend.add_train_args(parser)
    theirs: dict[str, Any] = {
        "speculator_type": "eagle3",
        "target_layer_ids": [2, 4, 5],
    }
    own = vars(parser.parse_args(["--draftmq", cluster.broker.client_endpoint]))
    return SimpleNamespace(**(theirs | own | {"draftmq_timeout": 20.0} | changes))


@pytest.fixture
def data(tmp_path: Path) -> str:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, VOCAB, (length,), generator=draw) for length in (5, 17, 1)]
    rows.append(torch.tensor([1, 2, VOCAB + 3]))  # of another tokenizer
    torch.save(rows, tmp_path / "rows.pt")
    return str(tmp_path / "rows.pt")


@pytest.fixture
def transfer(ours: Any, cluster: Cluster, data: str) -> Iterator[Callable[..., Any]]:
    """Makes one as a DataLoader's worker process gets it, which is closed in the end."""
    opened = []

    def make(**changes: Any) -> Any:
        made = ours.Backend.from_train_args(arguments(ours, cluster, **changes), data)
        opened.append(pickle.loads(pickle.dumps(made)))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.mark.parametrize("theirs", [[2, 4, 5], [5, 2, 4], [0, 8], [3]])
def test_a_sample_has_their_layers_in_their_order_and_the_last_one_unnormed(
    transfer: Any, cluster: Cluster, target: HuggingFaceTarget, data: str, theirs: list[int]
) -> None:
    cluster.worker()
    sample = transfer(target_layer_ids=theirs).get_cached(1)
    ids = torch.load(data)[1]
    assert torch.equal(sample["token_ids"], ids)
    one = ids[None]
    ones = torch.ones_like(one)
    wish = "layers=-1,0,1,2,3,4,5,6,7"
    every = compute_supervision(target, one, ones, ones, encoding=wish)["states"][0]
    # their k is the output of our k-1, which is at k here
    assert torch.equal(sample["hidden_states"], every[:, [*theirs, 8]])


def test_fp8_is_asked_for_on_the_wire_only(transfer: Any, cluster: Cluster) -> None:
    cluster.worker()
    exact = transfer().get_cached(1)["hidden_states"]
    got = transfer(draftmq_states="fp8").get_cached(1)["hidden_states"]
    assert got.dtype == exact.dtype
    assert not torch.equal(got, exact)
    torch.testing.assert_close(got, exact, rtol=0.07, atol=0.05)


def test_a_sample_that_no_worker_takes_is_left_out_and_counted(
    transfer: Any, cluster: Cluster
) -> None:
    cluster.worker()
    opened = transfer()
    missing = opened.get_cached(3)
    assert isinstance(missing, standin.SampleUnavailable)
    assert missing.counts_as_failure
    assert "is 259, and the target's vocabulary has 256" in missing.reason
    assert opened.get_cached(0)["token_ids"].shape == (5,)


def test_nothing_else_is_taken_in_the_place_of_a_broker(
    ours: Any, transfer: Any, cluster: Cluster
) -> None:
    cluster.worker(make_target())
    with pytest.raises(RuntimeError, match="has no endpoint of vLLM's"):
        transfer().get_generated({})
    with pytest.raises(SystemExit, match="draftmq worker --target MODEL"):
        ours.Backend.build_kv_transfer_config(argparse.Namespace())


def test_layers_are_those_that_were_said_or_that_a_draft_has(tmp_path: Path) -> None:
    said = SimpleNamespace(speculator_type="dflash", target_layer_ids=[3, 1], from_pretrained="")
    assert target_layers(said) == (3, 1)
    nothing = SimpleNamespace(speculator_type="eagle3", target_layer_ids=None, from_pretrained=None)
    assert target_layers(nothing) is None
    assert default_layers(32) == (2, 16, 29)
    (tmp_path / "config.json").write_text(json.dumps({"aux_hidden_state_layer_ids": [4, 9]}))
    again = SimpleNamespace(
        speculator_type="dflash", target_layer_ids=None, from_pretrained=str(tmp_path)
    )
    assert target_layers(again) == (4, 9)
    assert target_layers(SimpleNamespace(speculator_type="mtp", target_layer_ids=[1])) == ()


def test_a_wish_ascends_whatever_their_order_and_names_a_layer_once() -> None:
    wish = wish_for((32, 2, 16), 32, fp8=False)
    assert str(wish) == "layers=1,15,31"
    assert columns((32, 2, 16), 32, wish) == [2, 0, 1, 2]
    assert str(wish_for((), 32, fp8=True)) == "layers=31;states=fp8"
