"""Kernels of pdserve: each op a Triton kernel with a validating wrapper, a torch reference, and a test."""
