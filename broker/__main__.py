"""``python -m broker`` is ``draftmq broker``."""

from broker.commands import main

if __name__ == "__main__":
    main(["broker"])
