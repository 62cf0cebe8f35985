"""``python -m broker`` is ``draftmq broker``."""

from trainer_client.cli import main

if __name__ == "__main__":
    main(["broker"])
