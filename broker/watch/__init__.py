"""What operators see: HTTP pages, metrics, ``draftmq status`` and ``draftmq top``."""
