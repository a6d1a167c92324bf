"""The public gRPC protocol and its generated stubs; `generate` makes them anew from the .proto files."""
