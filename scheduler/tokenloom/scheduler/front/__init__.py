"""The front: gRPC, text and what a stream needs; everything else is the core's."""
