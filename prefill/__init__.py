"""Prefill workers: read prompts, push their KV to decode workers."""
