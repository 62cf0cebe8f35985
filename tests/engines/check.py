"""Does an exported draft do in other engines what it does here? Exits 1 when it does not.

speculators must read it without a warning; vLLM must find every weight and the right aux layers,
write the text that it writes without the draft, and accept as many drafted tokens as we do.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trainer_client.commands.tokenizer import load_tokenizer
from trainer_client.drafts.export import read_config, read_draft, write_draft
from trainer_client.drafts.layers import aux_layer_ids
from trainer_client.drafts.lint import check_draft
from trainer_client.evaluation.decoding import EvalResult, evaluate, greedy_decode
from trainer_client.evaluation.prompts import load_prompts
from worker.targets import load_target, resolve

HERE = Path(__file__).parent
WORK = Path("build/engines")
#: vLLM and draftmq count the same checks in float32; what is left are ties that fall otherwise.
TOLERANCE = 0.02
#: Where vLLM's warnings about threads, Triton, OpenMP and eager mode come from. All others fail.
HARMLESS = {"__init__.py", "arg_utils.py", "cpu.py", "cpu_worker.py", "torch_utils.py", "vllm.py"}
VLLM = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Check:
    """One thing that must hold."""

    name: str
    holds: bool
    seen: str


class Engines:
    """The other environment: its scripts are run, their output is kept in build/engines."""

    def __init__(self, python: Path) -> None:
        # not resolved: the link's own place is what tells Python its environment
        self._python = Path(os.path.abspath(python))

    def speculators(self, script: str, *arguments: object) -> tuple[bool, str]:
        """Whether a script of speculators ended well, and its last word."""
        code, log = self._run(script, f"{script}.py", arguments)
        return code == 0, log.strip().splitlines()[-1] if log.strip() else "said nothing"

    def vllm(self, name: str, job: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """Tokens and figures of a job, and vLLM's log."""
        given, made = WORK / f"{name}.job.json", WORK / f"{name}.result.json"
        given.write_text(json.dumps(job))
        code, log = self._run(name, "in_vllm.py", [given.resolve(), made.resolve()])
        if code:
            sys.exit(f"vLLM ended with {code}, see {WORK / name}.log:\n{log[-2000:]}")
        result: dict[str, Any] = json.loads(made.read_text())
        return result, log

    def _run(self, name: str, script: str, arguments: Sequence[object]) -> tuple[int, str]:
        command = [str(self._python), str(HERE / script), *map(str, arguments)]
        done = subprocess.run(
            command,
            env=os.environ | VLLM,
            cwd=WORK,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        (WORK / f"{name}.log").write_text(done.stdout)
        return done.returncode, done.stdout


def warnings_in(log: str) -> list[str]:
    """vLLM's warnings and errors, but for those of a machine without a GPU."""
    lines = re.findall(r"(?:WARNING|ERROR) \S+ \S+ \[(\S+?):\d+\] (.*)", log)
    return [f"{file}: {text}" for file, text in lines if file not in HARMLESS]


def layers_in(log: str) -> list[int]:
    """The indices of hidden_states that vLLM says it gives to the draft."""
    said = re.search(r"auxiliary layers from .*?: \(([\d, ]+)\)", log)
    return [int(layer) for layer in said[1].split(",")] if said else []


def vllm_checks(
    engines: Engines,
    draft: Path,
    where: str,
    ours: EvalResult,
    prompts: list[list[int]],
    new_tokens: int,
) -> tuple[list[Check], dict[str, Any]]:
    """Decode with and without the draft."""
    layers = aux_layer_ids(draft)
    job = {"target": where, "prompts": prompts, "max_new_tokens": new_tokens}
    job |= {"draft": None, "draft_tokens": ours.draft_tokens}
    plain, _ = engines.vllm("vllm-plain", job)
    fast, log = engines.vllm("vllm-draft", job | {"draft": str(draft.resolve())})
    warned = warnings_in(log)
    length = 1 + fast["accepted"] / fast["drafts"]
    same = sum(a == b for a, b in zip(plain["tokens"], fast["tokens"], strict=True))
    apart = abs(length / ours.accept_length - 1)
    checks = [
        Check("vLLM has no warning", not warned, "; ".join(warned) or "none"),
        Check(
            "vLLM takes the aux layers",
            layers is not None and layers_in(log) == [layer + 1 for layer in layers],
            f"hidden_states {layers_in(log)} for layers {layers}",
        ),
        Check(
            "vLLM's text is that without the draft",
            same == len(prompts),
            f"{same} of {len(prompts)} prompts",
        ),
        Check(
            f"vLLM accepts what draftmq eval says, within {TOLERANCE:.0%}",
            apart <= TOLERANCE,
            f"{length:.3f} there, {ours.accept_length:.3f} here",
        ),
    ]
    depths = [accepted / fast["drafts"] for accepted in fast["accepted_per_depth"]]
    return checks, {"accept_length": length, "depth_acceptance": depths, "tokens": plain["tokens"]}


def main() -> None:
    """Run all checks on one draft."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--python", type=Path, required=True, help="of the engines' environment")
    parser.add_argument("--target", default="embedded", help="name or folder")
    parser.add_argument("--prompts", type=Path, help="data as for draftmq eval")
    parser.add_argument("--count", type=int, default=12, help="prompts taken")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--draft-tokens", type=int, default=5)
    given = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    engines, new_tokens = Engines(given.python), given.max_new_tokens

    where = resolve(given.target)
    where = str(Path(where).resolve()) if Path(where).exists() else where
    layers = aux_layer_ids(given.draft)
    target = load_target(given.target, dtype="float32", aux_layer_ids=layers)
    prompts = load_prompts(
        load_tokenizer(target.tokenizer, trust_remote_code=False),
        given.target,
        given.prompts,
        given.count,
        48,
    )
    draft = read_draft(given.draft, target.get_input_embeddings().weight)
    ours = evaluate(
        target,
        draft,
        prompts,
        max_new_tokens=new_tokens,
        draft_tokens=given.draft_tokens,
        eos=(),
    )
    findings = check_draft(given.draft)
    loads, said = engines.speculators("in_speculators", given.draft.resolve(), where)
    theirs_too = WORK / "speculators-format"
    facts = {"config": read_config(given.draft), "aux_layer_ids": layers}
    write_draft(draft, theirs_too, target_info=facts, verifier=where)
    in_format = engines.speculators("in_speculators_format", theirs_too.resolve())
    config = read_config(given.draft)
    fc_norm, aux = bool(config.get("fc_norm")), config.get("num_aux_hidden_states")
    vllm, theirs = vllm_checks(engines, given.draft, where, ours, prompts, new_tokens)
    checks = [
        Check("draftmq export --check", not findings, f"{len(findings)} findings"),
        Check("text is plain greedy text here", ours.lossless, f"{ours.tokens} tokens"),
        Check(
            "speculators loads it without a warning",
            loads or (fc_norm and "Unexpected keys" in said and said.count("fc_norm") == aux),
            f"{said} (its converter has no fc_norm)" if fc_norm else said,
        ),
        Check("speculators loads it in its own format", *in_format),
        *vllm,
    ]
    tokens = theirs.pop("tokens")
    plain = [greedy_decode(target, prompt, new_tokens, ()).tokens for prompt in prompts]
    theirs["same_text_as_draftmq"] = sum(a == b for a, b in zip(plain, tokens, strict=True))
    result = {"draft": str(given.draft), "draftmq": asdict(ours), "vllm": theirs}
    result["checks"] = [asdict(check) for check in checks]
    (WORK / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    for check in checks:
        print(f"{'ok  ' if check.holds else 'FAIL'}  {check.name}: {check.seen}")
    print(f"      {theirs['same_text_as_draftmq']} of {len(prompts)} texts are also draftmq's own")
    sys.exit(not all(check.holds for check in checks))


if __name__ == "__main__":
    main()
