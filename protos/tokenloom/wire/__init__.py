"""Messages between the scheduler's core and its workers, over ZeroMQ.

`messages` defines them, `codec` turns them into frames and back. Nothing here imports torch,
grpc or zmq.
"""
