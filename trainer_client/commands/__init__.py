"""The commands of the trainer: train, evaluate, export, demo."""
