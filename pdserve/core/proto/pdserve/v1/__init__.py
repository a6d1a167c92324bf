"""Protocol package `pdserve.v1`: the `Generation` service."""
