"""``python -m worker`` is ``draftmq worker``."""

from trainer_client.cli import main

if __name__ == "__main__":
    main(["worker"])
