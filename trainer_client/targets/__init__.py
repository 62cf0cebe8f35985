"""The target as a trainer sees it: remote through a broker, or in its own process."""
