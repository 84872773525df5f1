"""The public gRPC API: generated from inference.proto by `make gen`."""
