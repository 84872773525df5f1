"""The worker: weights, KV pool, forward passes and sampling on one device.

`cli` starts it, `loop` speaks with the core, `runner` computes steps; `fake` is
a worker without a model. Nothing here imports grpc.
"""
