"""The three cores in one process, on a network, clocks and faults that come from a seed."""
