"""``python -m trainer_client`` is ``draftmq train``."""

from trainer_client.cli import main

if __name__ == "__main__":
    main(["train"])
