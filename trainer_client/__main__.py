"""``python -m trainer_client`` is ``draftmq train``."""

from broker.commands import main

if __name__ == "__main__":
    main(["train"])
