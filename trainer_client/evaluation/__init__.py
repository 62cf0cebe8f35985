"""How many tokens a draft gets accepted, measured by speculative decoding."""
