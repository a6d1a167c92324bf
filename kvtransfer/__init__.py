"""Moves KV blocks from one worker's pool into another's. Every move is a push with a deadline."""
