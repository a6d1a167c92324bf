"""Kernels of pdserve: each op a Triton kernel with a validating wrapper, a torch reference, and a test.

Importing this package needs no Triton; importing a kernel module (`pdkernels.norm`, ...) does, and raises
`TritonUnavailable` where it is not installed. `pdkernels.reference` needs torch alone.
"""
