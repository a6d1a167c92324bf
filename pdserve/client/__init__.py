"""A small typed client of the gRPC endpoint."""
