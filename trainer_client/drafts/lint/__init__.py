"""What engines get wrong silently about an EAGLE-3 draft on disk, found before they do.

Read from vLLM's and SGLang's ``models/llama_eagle3.py``; the issue numbers are of threads in which
somebody met the trap.
"""

from __future__ import annotations

from pathlib import Path

from trainer_client.drafts.export import canonical, read_config, read_tensors
from trainer_client.drafts.lint import config as configs
from trainer_client.drafts.lint import tensors as weights
from trainer_client.drafts.lint.findings import Finding, warning

__all__ = ["Finding", "check_draft"]


def check_draft(directory: Path) -> list[Finding]:
    """All findings about a draft's ``config.json`` and tensors.

    Raises :class:`ExportError` where these cannot be read at all.
    """
    config, tensors = read_config(directory), read_tensors(directory)
    findings = [*configs.config_findings(config), *weights.name_findings(tensors)]
    if not any(directory.glob("*.safetensors")):
        findings.append(
            warning("the weights are a pickle (pytorch_model.bin); write model.safetensors")
        )
    config, tensors = configs.well_typed(config), canonical(tensors)
    findings += weights.key_findings(tensors)
    if configs.sizes_are_said(config):
        findings += weights.shape_findings(config, tensors)
        findings += weights.vocabulary_findings(config, tensors)
    return [*findings, *weights.weight_findings(config, tensors)]
