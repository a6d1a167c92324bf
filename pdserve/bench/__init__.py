"""The SLA benchmark: how much load meets the targets, where a slow request lost its time, what it costs.

Needs `pdserve.client` and `pdserve.core` only: it drives any gRPC or OpenAI-compatible server from outside.
"""
