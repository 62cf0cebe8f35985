"""Training data as people have it: files, records, chat templates, tokens with a loss mask."""
