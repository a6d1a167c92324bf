"""Quantised checkpoints as they are published: FP8, GPTQ and AWQ."""
