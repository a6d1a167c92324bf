"""The coordinator: gRPC gateway, admission, routing and the request registry. Imports no torch."""
