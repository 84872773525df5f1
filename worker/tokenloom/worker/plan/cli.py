"""The `plan` command: reads what a checkpoint tells and prints what of it fits where."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from tokenloom.worker.errors import LoadError, UnsupportedModelError
from tokenloom.worker.gpus import GPUS, Gpu, find_gpu
from tokenloom.worker.options import (
    WorkerOptions,
    argument,
    parse_bytes,
    parse_count,
    parse_fraction,
)
from tokenloom.worker.plan.capacity import Checkpoint, Precision, Serving, make_plan
from tokenloom.worker.plan.reading import read_checkpoint
from tokenloom.worker.plan.report import as_json, as_text
from tokenloom.worker.plan.sizes import ITEM_BYTES
from tokenloom.worker.weights.formats import FORMAT_NAMES, format_named
from tokenloom.worker.weights.sharding import why_not_split

_CONTEXT_TOKENS = 4096
_MAX_NUM_REQUESTS = 256
_DOES_NOT_FIT = 1
_REFUSED = 2


def plan(argv: Sequence[str] | None = None) -> int:
    """Prints a plan and returns the exit status.

    0 if something of it fits, 1 if nothing does, 2 if the checkpoint cannot be read or served or
    an option is wrong.
    """
    args = _parser().parse_args(argv)
    try:
        checkpoint = read_checkpoint(args.model)
        serving = _serving(checkpoint, args)
        made = make_plan(checkpoint, serving, _precisions(checkpoint, serving, args), args.gpu)
    except LoadError as error:
        sys.stderr.write(f"tokenloom plan: {error}\n")
        return _REFUSED
    print(as_json(made) if args.json else as_text(made))
    return 0 if any(row.fits for row in made.rows) else _DOES_NOT_FIT


def _serving(checkpoint: Checkpoint, args: argparse.Namespace) -> Serving:
    """Returns how it is to be served. Raises LoadError for what the server refuses, too."""
    config = checkpoint.config
    dtype = (config.dtype or "float32") if args.dtype == "auto" else args.dtype
    if dtype not in ITEM_BYTES:
        raise LoadError(f"dtype {dtype} is not supported; supported are {', '.join(ITEM_BYTES)}")
    longest, bound = config.max_model_tokens, "the checkpoint is made for"
    if args.max_model_tokens is not None:
        if args.max_model_tokens > longest:
            raise LoadError(f"--max-model-tokens is {args.max_model_tokens}; {bound} {longest}")
        longest, bound = args.max_model_tokens, "--max-model-tokens is"
    context_tokens = args.context or min(_CONTEXT_TOKENS, longest)
    if context_tokens > longest:
        raise LoadError(f"--context is {context_tokens}; {bound} {longest}")
    stored = {} if checkpoint.stored is None else checkpoint.stored.forms
    if (reason := why_not_split(config, args.tensor_parallel, stored)) is not None:
        raise LoadError(f"--tensor-parallel {args.tensor_parallel} cannot be: {reason}")
    return Serving(
        dtype=dtype,
        kv_types=("fp8",) if args.kv_cache == "fp8" else (dtype, "fp8"),
        context_tokens=context_tokens,
        num_ranks=args.tensor_parallel,
        max_model_tokens=args.max_model_tokens,
        max_num_requests=args.max_num_requests,
        max_step_tokens=args.max_step_tokens,
        kv_memory_fraction=args.kv_memory_fraction,
    )


def _precisions(
    checkpoint: Checkpoint, serving: Serving, args: argparse.Namespace
) -> tuple[Precision, ...]:
    """Returns the rows: what was asked for, else all that can be."""
    stored = checkpoint.stored
    if stored is not None and args.quantize not in {None, "none", stored.label}:
        raise UnsupportedModelError(
            f"--quantize is {args.quantize}; the checkpoint is stored in {stored.label} already"
        )
    if stored is None and args.quantize == "none" and args.quantize_lm_head:
        raise LoadError(
            "--quantize-lm-head is set, but neither --quantize nor the checkpoint says to what"
        )
    if stored is not None or args.quantize is not None:
        asked = stored.label if stored is not None else args.quantize
        return (_precision(asked, serving, quantizes_head=args.quantize_lm_head),)
    plain = (("none", False), ("int8", False), ("nf4", False))
    every = (("int8", True), ("nf4", True)) if args.quantize_lm_head else (*plain, ("nf4", True))
    return tuple(_precision(name, serving, quantizes_head=head) for name, head in every)


def _precision(name: str, serving: Serving, *, quantizes_head: bool) -> Precision:
    label = serving.dtype if name == "none" else name
    return Precision(
        label=f"{label}, head too" if quantizes_head else label,
        form=format_named(name),
        quantizes_head=quantizes_head,
    )


def _parse_memory(text: str) -> Gpu:
    return Gpu(name=text, memory_bytes=parse_bytes(text), datasheet_bytes_per_s=None)


def _parser() -> argparse.ArgumentParser:
    defaults = WorkerOptions()
    positive = argument(partial(parse_count, at_least=1))
    parser = argparse.ArgumentParser(
        prog="tokenloom plan",
        description="Tells, before there is a GPU: which precision, does it fit, how many requests."
        " Reads config.json and the headers of the weights, from the Hub nothing else.",
        epilog="Exit status: 0 if something fits, 1 if nothing does, 2 if it cannot be served.",
    )
    parser.add_argument("model", metavar="MODEL", help="a local folder or a Hub id")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--gpu",
        type=argument(find_gpu),
        metavar="NAME",
        help=f"{', '.join(gpu.name for gpu in GPUS)} (default: for each precision the smallest)",
    )
    where.add_argument(
        "--memory",
        dest="gpu",
        type=argument(_parse_memory),
        metavar="SIZE",
        help="of any other GPU, as its driver tells it, such as 23.6GiB",
    )
    parser.add_argument(
        "--tensor-parallel", type=positive, default=1, metavar="N", help="GPUs that share it (1)"
    )
    parser.add_argument(
        "--context", type=positive, metavar="N", help="prompt + completion of a request (4096)"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    server = parser.add_argument_group("as the server's", "options of `tokenloom serve`")
    server.add_argument(
        "--quantize", choices=FORMAT_NAMES, help="(default: side by side; as stored, if it is)"
    )
    server.add_argument("--quantize-lm-head", action="store_true", help="the head, too")
    server.add_argument("--dtype", default="auto", help=f"{', '.join(ITEM_BYTES)} or auto (auto)")
    server.add_argument(
        "--kv-cache", choices=("auto", "fp8"), default="auto", help="(default: auto; fp8 beside it)"
    )
    server.add_argument(
        "--max-model-tokens",
        type=argument(partial(parse_count, at_least=2)),
        metavar="N",
        help="longest prompt + completion (default: what the checkpoint is made for)",
    )
    server.add_argument(
        "--max-num-requests",
        type=positive,
        default=_MAX_NUM_REQUESTS,
        metavar="N",
        help=f"requests that run at once ({_MAX_NUM_REQUESTS})",
    )
    server.add_argument(
        "--max-step-tokens", type=positive, metavar="N", help="tokens of a step (8192)"
    )
    server.add_argument(
        "--kv-memory-fraction",
        type=argument(parse_fraction),
        default=defaults.kv_memory_fraction,
        metavar="FRACTION",
        help=f"part of the memory left for the KV cache ({defaults.kv_memory_fraction})",
    )
    return parser
