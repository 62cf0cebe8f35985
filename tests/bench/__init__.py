"""Benchmarks: what draftmq does beside a peer or a limit, in one run on one machine."""
