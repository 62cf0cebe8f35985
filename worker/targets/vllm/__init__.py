"""Targets inside vLLM, of any size that it serves: unpatched, by its public configuration.

vLLM keeps the states of chosen layers in a paged cache (its method ``extract_hidden_states``); a KV
connector of ours takes a prompt's rows out in the step that completes the prompt. Only
``draftmq worker --target vllm:MODEL`` imports what is here.
"""
