"""Runs in the engines' environment: vLLM on CPU decodes prompts greedily, with or without a draft.

Reads ``{"target", "draft" (or null), "prompts", "max_new_tokens", "draft_tokens"}`` from a JSON
file, and writes ``{"tokens": [[...]], "drafts", "accepted", "accepted_per_depth"}`` to another.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    options: dict[str, Any] = {}
    longest = max(map(len, job["prompts"])) + job["max_new_tokens"] + job["draft_tokens"] + 1
    if job["draft"]:
        options["speculative_config"] = {
            "method": "eagle3",
            "model": job["draft"],
            "num_speculative_tokens": job["draft_tokens"],
        }
    llm = LLM(
        model=job["target"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=longest,
        disable_log_stats=False,
        **options,
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
        SamplingParams(temperature=0.0, max_tokens=job["max_new_tokens"], ignore_eos=True),
        use_tqdm=False,
    )
    metrics = {metric.name: metric for metric in llm.get_metrics() if "spec_decode" in metric.name}
    result: dict[str, Any] = {"tokens": [list(one.outputs[0].token_ids) for one in outputs]}
    if metrics:
        result |= {
            "drafts": metrics["vllm:spec_decode_num_drafts"].value,
            "accepted": metrics["vllm:spec_decode_num_accepted_tokens"].value,
            "accepted_per_depth": list(
                metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values
            ),
        }
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
