"""vLLM's speculators trains from our workers: a backend for its hidden states, and nothing patched.

Importing :mod:`trainer_client.speculators.backend` registers it as ``draftmq``; see
``docs/speculators.md``. Nothing here is imported by anybody else.
"""
