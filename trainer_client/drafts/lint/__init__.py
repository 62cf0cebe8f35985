"""What engines get wrong silently about an EAGLE-3 draft on disk, found before they do.

Read from vLLM's and SGLang's ``models/llama_eagle3.py``; the issue numbers are of threads in which
somebody met the trap.
"""

from __future__ import annotations

from pathlib import Path

from trainer_client.drafts.export import canonical, draft_folder, read_config, read_tensors
from trainer_client.drafts.kinds import Kind, kind_of, plain_config
from trainer_client.drafts.lint import config as configs
from trainer_client.drafts.lint import tensors as weights
from trainer_client.drafts.lint.findings import Finding, warning
from trainer_client.drafts.lint.variants import variant_findings

__all__ = ["Finding", "check_draft"]


def check_draft(directory: Path) -> list[Finding]:
    """All findings about a draft's ``config.json`` and tensors.

    A draft of another family, or in another layout, is named first; of another family nothing more
    is known here. Raises :class:`ExportError` where these cannot be read at all.
    """
    config, tensors = read_config(directory), read_tensors(directory)
    kind = kind_of(config, tensors)
    if not kind.family.startswith("EAGLE-3"):
        return [_other_family(kind), *weights.finite_findings(tensors)]
    if kind.layout == "speculators":
        config = plain_config(config)
        findings = [
            warning(
                f"this is an {kind}: vLLM loads it, SGLang reads nothing of it; for SGLang write "
                "the engines' layout"
            )
        ]
    else:
        findings = [*configs.config_findings(config), *weights.name_findings(tensors)]
    if kind.layout == "NeMo AutoModel":
        findings.insert(0, warning(f"this is an {kind}: its names are not those that engines load"))
    if not any(draft_folder(directory).glob("*.safetensors")):
        findings.append(
            warning("the weights are a pickle (pytorch_model.bin); write model.safetensors")
        )
    config, tensors = configs.well_typed(config), canonical(tensors)
    findings += variant_findings(config, tensors)
    findings += weights.key_findings(config, tensors)
    if configs.sizes_are_said(config):
        findings += weights.shape_findings(config, tensors)
        findings += weights.vocabulary_findings(config, tensors)
    return [*findings, *weights.weight_findings(config, tensors)]


def _other_family(kind: Kind) -> Finding:
    loads = {
        "P-EAGLE": "vLLM loads it with parallel_drafting, pard_token and mask_hidden; SGLang 0.5 "
        "has no such network",
        "DFlash": "vLLM and SGLang load it as DFlashDraftModel, SGLang with the full vocabulary",
        "DSpark": "vLLM and SGLang load it as Qwen3DSparkModel",
    }
    known = loads.get(kind.family, "ask its engine's documents")
    return warning(f"this is a {kind}, which this check does not know beyond its name: {known}")
