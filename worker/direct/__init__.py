"""Tensors moved directly between one worker and one trainer rank; both ends use this package."""
