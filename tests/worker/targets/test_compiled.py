from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from broker.commands import cli
from tests.worker.targets.tiny_models import HAS_COMPILER, make, tokens
from worker.cli import worker
from worker.errors import TargetError
from worker.targets import compile_target
from worker.targets.contract import TargetOutputs
from worker.targets.foreign import ForeignTarget
from worker.targets.huggingface import HuggingFaceTarget
from worker.targets.stub import StubTarget

#: What docs/worker-pipeline.md promises of float32: a difference, of the largest value.
TOLERANCE = 1e-5
#: Rows, tokens, padding of the last row.
SHAPES = [(1, 12, 0), (1, 64, 0), (2, 8, 0), (5, 33, 0), (1, 40, 5), (2, 13, 1), (3, 64, 9)]


def run(target: HuggingFaceTarget, rows: int, length: int, padding: int) -> TargetOutputs:
    ids, mask, loss_mask = tokens(rows, length, seed=length)
    mask[-1, length - padding :] = 0
    with torch.inference_mode():
        return target.forward(ids, mask, loss_mask)


def run_all(target: HuggingFaceTarget) -> list[TargetOutputs]:
    return [run(target, *shape) for shape in SHAPES]


def parts(outputs: list[TargetOutputs]) -> list[torch.Tensor]:
    found = []
    for each in outputs:
        assert each.last_hidden_state is not None
        found += [each.aux_hidden_states, each.logits, each.last_hidden_state]
    return found


@pytest.fixture
def compile_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Has torch.compile end in a backend of the test's."""

    def use(backend: Any) -> None:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))

    return use


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Models of one library share functions, and torch has a limit for each."""
    torch.compiler.reset()


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_compiled_layers_give_what_they_gave_within_the_tolerance() -> None:
    target = HuggingFaceTarget(make("llama"), name="tiny")
    eager = parts(run_all(target))
    target.compile_forward()
    for got, wanted in zip(parts(run_all(target)), eager, strict=True):
        assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    target.close()


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2"])
def test_all_is_compiled_at_the_start_and_nothing_for_a_length_or_a_thread(
    kind: str, compile_with: Callable[[Any], None]
) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_with(backend)
    target = HuggingFaceTarget(make(kind), name=kind)
    eager = parts(run_all(target))
    target.compile_forward()
    assert len(graphs) == 4
    made: list[TargetOutputs] = []
    thread = threading.Thread(target=lambda: made.extend(run_all(target)))
    thread.start()
    thread.join()
    assert len(graphs) == 4
    assert all(map(torch.equal, parts(made), eager))  # the same operations, in the same order
    target.close()


def test_a_compiler_that_fails_is_one_sentence_and_the_target_as_it_was(
    compile_with: Callable[[Any], None],
) -> None:
    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        raise OSError("the compiler is ill\nin two lines")

    compile_with(backend)
    target = HuggingFaceTarget(make("llama"), name="tiny")
    eager = parts(run_all(target))
    said = r"cannot compile target 'tiny' \(.*OSError: the compiler is ill in two lines\); see .*"
    with pytest.raises(TargetError, match=said) as caught:
        target.compile_forward()
    assert "\n" not in str(caught.value)
    assert all(map(torch.equal, parts(run_all(target)), eager))


def test_close_leaves_the_model_as_it_was(compile_with: Callable[[Any], None]) -> None:
    compile_with("eager")
    model = make("llama")
    own = model.model.layers[2].forward
    model.model.layers[2].forward = own  # as accelerate sets one
    target = HuggingFaceTarget(model, name="tiny")
    target.compile_forward()
    assert all("forward" in vars(layer) for layer in model.model.layers)
    target.close()
    assert [vars(layer).get("forward") for layer in model.model.layers] == [
        own if number == 2 else None for number in range(8)
    ]


# -- the option --------------------------------------------------------------------------------

_WORKER = ["worker", "--broker", "tcp://127.0.0.1:1"]


def test_a_target_that_cannot_be_compiled_is_refused_at_the_start() -> None:
    with pytest.raises(TargetError, match="'theirs' cannot compile its forward; leave --compile"):
        compile_target(ForeignTarget(StubTarget(), "theirs"))
    factory = ["--target-factory", "worker.targets.stub:StubTarget"]
    done = CliRunner().invoke(cli, [*_WORKER, *factory, "--compile"])
    assert isinstance(done.exception, TargetError)
    assert "'stub' cannot compile its forward" in str(done.exception)


def test_the_setting_comes_from_option_environment_file_and_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(worker, "callback", lambda **given: seen.append(given["compile"]))
    file = tmp_path / "draftmq.toml"
    file.write_text("[worker]\ncompile = true\n")
    config = ["--config", str(file)]
    for before, said, options in (
        ([], None, []),
        (config, None, []),
        (config, "0", []),
        ([], "1", []),
        (config, "1", ["--no-compile"]),
        ([], "0", ["--compile"]),
    ):
        environment = {"DRAFTMQ_WORKER_COMPILE": said}
        done = CliRunner().invoke(cli, [*before, *_WORKER, *options], env=environment)
        assert done.exit_code == 0, done.output
    assert seen == [False, True, False, True, False, True]
    done = CliRunner().invoke(cli, _WORKER, env={"DRAFTMQ_WORKER_COMPILE": "perhaps"})
    assert done.exit_code == 2
    assert "'perhaps' is not a valid boolean" in done.output


def test_a_missing_compiler_ends_the_worker_before_it_serves(tmp_path: Path) -> None:
    environment = {"CXX": str(tmp_path / "no-g++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", *_WORKER, "--target", "embedded", "--compile"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last.startswith("draftmq: cannot compile target 'embedded' (")
    assert "No working C++ compiler" in last
    assert last.endswith("or leave --compile away")
