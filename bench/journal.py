"""What telling of a request costs a front: its record, its line in the log, its trace span.

    python bench/journal.py [--calls 2000] [--rounds 5]

Runs calls through a front's journal without gRPC or a core around it, and prints for each way of
telling the CPU time of a call, in microseconds: in the event loop's thread, and in the one that
encodes spans and sends them to a collector, a process that throws them away. The fastest round.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import grpc

from tokenloom.scheduler.front.counts import CallCounts
from tokenloom.scheduler.front.journal import Journal
from tokenloom.scheduler.front.streams import Stream
from tokenloom.scheduler.front.text import TextModel, load_text_model
from tokenloom.scheduler.front.tracing import Tracing
from tokenloom.scheduler.messages import Finished, FinishReason
from tokenloom.wire.logs import set_up_logs
from tokenloom.wire.messages import SamplingParams

MODEL = Path(__file__).parents[1] / "models" / "pocket"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-"
COLLECTOR = "opentelemetry.proto.collector.trace.v1.TraceService"
SAMPLING = SamplingParams(
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    repetition_penalty=1.0,
    seed=1,
    min_tokens=0,
    stop_token_ids=(),
    logit_bias=(),
    num_top_logprobs=None,
)
FINISHED = Finished(
    stream=1,
    reason=FinishReason.LENGTH,
    stop_token_id=None,
    num_completion_tokens=1,
    queue_s=0.01,
    prefill_s=0.02,
    decode_s=1.5,
)


class Context:
    """What the journal asks a call of gRPC."""

    def __init__(self, flags: str) -> None:
        self._metadata = (("user-agent", "bench"), ("traceparent", PARENT + flags))

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns the caller's, a traceparent among them."""
        return self._metadata


def main() -> None:
    """Measures each way of telling and prints a line of JSON for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=2000, help="a round; more spans are dropped")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    text = load_text_model(str(MODEL))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where the log goes
    here, there = multiprocessing.Pipe()
    collector = multiprocessing.get_context("spawn").Process(target=collect, args=(there,))
    collector.start()
    endpoint = f"http://127.0.0.1:{here.recv()}"
    ways = (
        ("neither line nor span", None, "", "01"),
        ("line of text", "text", "", "01"),
        ("line of JSON", "json", "", "01"),
        ("span that is not sampled", None, endpoint, "00"),
        ("span", None, endpoint, "01"),
    )
    for name, form, way_endpoint, flags in ways:
        logging.getLogger().handlers.clear()
        set_up_logs("front", form=form or "text", level="info" if form else "error")
        rounds = [
            run(text, way_endpoint, Context(flags), options.calls) for _ in range(options.rounds)
        ]
        loop_us, others_us = min(rounds)
        figures = {"loop_us": round(loop_us, 1), "other_threads_us": round(others_us, 1)}
        print(json.dumps({"way": name, **figures}), flush=True)
    collector.terminate()


def run(text: TextModel, endpoint: str, context: Context, num_calls: int) -> tuple[float, float]:
    """Returns the CPU microseconds of a call: in this thread, and in all others."""
    traces = Tracing(endpoint=endpoint, model="pocket", version="bench") if endpoint else None
    journal = Journal(traces, CallCounts(), gpu_hour_price=None)
    begin, begin_here = time.process_time(), time.thread_time()
    for number in range(num_calls):
        with journal.entry(cast("Any", context)) as record:
            stream = Stream(
                number=number,
                detokenizer=text.detokenizer(skip_special_tokens=True),
                scanner=None,
                min_tokens=0,
                stop_token_ids=frozenset(),
                max_buffer_tokens=16,
                on_stop=lambda _, __: None,
                on_event=record.mark,
            )
            record.num_prompt_tokens = record.max_tokens = 16
            record.sampling, record.stream = SAMPLING, stream
            stream.admit(0)
            stream.push(5, None)
            stream.finish(FINISHED)
    here_s = time.thread_time() - begin_here
    journal.close()  # which waits for the last span
    all_s = time.process_time() - begin
    return 1e6 * here_s / num_calls, 1e6 * (all_s - here_s) / num_calls


def collect(pipe: Connection) -> None:
    """Takes spans, and does nothing with them, until it is ended."""
    server = grpc.server(ThreadPoolExecutor(1))
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(
        lambda _, __: b""
    )
    service = grpc.method_handlers_generic_handler(COLLECTOR, {"Export": handler})
    server.add_generic_rpc_handlers((service,))
    pipe.send(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
