"""``draftmq chaos``: a TCP proxy that injects faults between real peers, by seed or by script."""
