"""``python -m worker`` is ``draftmq worker``."""

from broker.commands import main

if __name__ == "__main__":
    main(["worker"])
