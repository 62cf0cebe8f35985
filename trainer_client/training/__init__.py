"""Training drafts: data, optimizer, checkpoints, metrics, and the loop that joins them."""
