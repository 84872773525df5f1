"""A client as a process of its own, to be killed: `python -m tests.chaos.callers ADDRESS`.

It opens one long stream, reads it, and writes the kind of each message to stdout.
"""

from __future__ import annotations

import sys

import grpc

from tokenloom.v1 import inference_pb2 as pb
from tokenloom.v1.inference_pb2_grpc import InferenceStub


def long_request(seed: int) -> pb.GenerateRequest:
    """Returns a request whose every token weighs a few hundred bytes on the way."""
    return pb.GenerateRequest(
        tokens=pb.TokenIds(ids=[5, 6, 7]),
        sampling=pb.Sampling(seed=seed),
        stopping=pb.Stopping(ignore_eos=True),
        output=pb.Output(num_top_logprobs=20),
    )


def main(address: str) -> None:
    """Reads a stream until somebody puts an end to it."""
    with grpc.insecure_channel(address) as channel:
        for response in InferenceStub(channel).Generate(long_request(1)):
            sys.stdout.write(f"{response.WhichOneof('event')}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
