"""Composition root: the one place that reads the environment and starts Ray."""
