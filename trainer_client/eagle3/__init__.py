"""The EAGLE-3 draft and its training-time test (Li et al., 2025, arXiv:2503.01840)."""
