"""A worker that is several ranks (tensor parallelism): rank 0 leads, the others follow."""
