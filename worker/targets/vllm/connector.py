"""The KV connector that takes a prompt's states out of vLLM, in the step that completes the prompt.

vLLM imports this module in its own processes, by the name in ``kv_connector_module_path``. Nothing
waits for it and no block is held: the states lie in the paged cache, and are copied once. Written
for vLLM 0.32; that the base class is marked experimental is why the versions are pinned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer
from vllm.v1.kv_cache_interface import HiddenStateCacheSpec

from worker.targets.vllm.rows import RowsSender

#: Where the worker finds, in vLLM's answer, under which name it was given the rows.
ANSWERED = "draftmq_request"


@dataclass
class _Prompt:
    """A prompt on its way: how long it is, and the blocks that have its states so far."""

    length: int
    blocks: list[int]


@dataclass
class _Completed(KVConnectorMetadata):
    """What the scheduler tells the workers of one step: the prompts that it completes."""

    prompts: list[tuple[str, _Prompt]] = field(default_factory=list)


class StatesConnector(KVConnectorBase_V1, SupportsHMA):
    """One for the scheduler, which knows the blocks, and one in each rank, which has the cache."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        of_states = [
            number
            for number, group in enumerate(groups)
            if isinstance(group.kv_cache_spec, HiddenStateCacheSpec)
        ]
        if len(of_states) > 1 or (not of_states and len(groups) > 1):
            raise ValueError(
                f"{len(of_states)} of vLLM's {len(groups)} cache groups are for hidden states, and "
                "one was expected; this release of vLLM is not one that draftmq knows"
            )
        self._group = of_states[0] if of_states else 0
        self._prompts: dict[str, _Prompt] = {}
        self._cache: Tensor | None = None  # [blocks, L, tokens of a block, H]
        self._sender: RowsSender | None = None

    # -- in the scheduler -----------------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """No state is ever brought from elsewhere."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing was brought, so nothing is to be noted."""

    def build_connector_meta(self, scheduler_output: Any) -> _Completed:
        """The prompts whose last token this step computes, with their blocks."""
        computed = {}
        for new in scheduler_output.scheduled_new_reqs:
            blocks = list(new.block_ids[self._group])
            self._prompts[new.req_id] = _Prompt(len(new.prompt_token_ids), blocks)
            computed[new.req_id] = new.num_computed_tokens
        self._note_more_blocks(scheduler_output.scheduled_cached_reqs, computed)
        completed = _Completed()
        for request, tokens in scheduler_output.num_scheduled_tokens.items():
            prompt = self._prompts.get(request)
            if prompt is not None and computed.get(request, 0) + tokens >= prompt.length:
                completed.prompts.append((request, self._prompts.pop(request)))
        for request in scheduler_output.finished_req_ids:  # of these some were aborted
            self._prompts.pop(request, None)
        return completed

    def _note_more_blocks(self, cached: Any, computed: dict[str, int]) -> None:
        for number, request in enumerate(cached.req_ids):
            computed[request] = cached.num_computed_tokens[number]
            prompt, more = self._prompts.get(request), cached.new_block_ids[number]
            if prompt is None or more is None:
                continue
            if request in cached.resumed_req_ids:  # it was preempted, and begins anew
                prompt.blocks = []
            prompt.blocks += more[self._group]

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Its blocks are free at once; the answer says under which name its rows were sent."""
        return False, {ANSWERED: request.request_id}

    def request_finished_all_groups(
        self, request: Any, block_ids: Any
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same for a cache of several groups."""
        return self.request_finished(request, [])

    # -- in each rank ---------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Find the cache that has the states. All ranks have all of them; the first one speaks."""
        layers = get_layers_from_vllm_config(
            self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches)
        )
        (name,) = layers
        self._cache = kv_caches[name]
        if get_tensor_model_parallel_rank() == 0:
            address = self._kv_transfer_config.get_from_extra_config("rows", "")
            self._sender = RowsSender(address)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing is saved layer by layer."""

    def wait_for_save(self) -> None:
        """Send the rows of the prompts that this step completed; their states are in the cache."""
        if self._sender is None:
            return
        cache = self._cache
        assert cache is not None  # vLLM registers it before its first step
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, _Completed)
        for request, prompt in metadata.prompts:
            at = torch.tensor(prompt.blocks, device=cache.device)
            rows = cache[at].transpose(1, 2).flatten(0, 1)[: prompt.length]  # [T, L, H]
            self._sender.put(request, rows.contiguous())
