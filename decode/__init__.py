"""Decode workers: continuous batching of answers over KV that arrived or was computed here."""
