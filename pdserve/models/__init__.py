"""Decoder models in plain PyTorch, and how checkpoints are read."""
