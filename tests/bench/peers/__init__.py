"""Others that do what draftmq does, each in a virtual environment of its own under ``build/``."""
