"""The daemon between trainer ranks and target workers: ROUTER to ROUTER, never a tensor opened."""
