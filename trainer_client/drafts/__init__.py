"""Drafts as files: checkpoints of a run, exports for an engine, and what is wrong with one."""
