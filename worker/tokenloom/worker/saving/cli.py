"""The `quantize` command: its options, and what it tells."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenloom.worker.errors import LoadError
from tokenloom.worker.options import WorkerOptions

_REFUSED = 2


def quantize(argv: Sequence[str] | None = None) -> int:
    """Writes a quantized copy of a checkpoint and returns the exit status.

    0 when it is written, 2 if it cannot be or an option is wrong.
    """
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    # After the options are parsed, as torch takes seconds to import.
    from tokenloom.worker.loading import find_device
    from tokenloom.worker.saving.writing import QuantizeOptions, save_quantized

    options = QuantizeOptions(to=args.to, lm_head=args.lm_head, nested=args.nested)
    try:
        saved = save_quantized(args.model, args.out, options, find_device(args.device), _show)
    except LoadError as error:
        sys.stderr.write(f"tokenloom quantize: {error}\n")
        return _REFUSED
    print(
        f"{args.out}: {saved.num_quantized} matrices in {args.to}, weights"
        f" {saved.num_bytes / 2**30:.2f} GiB of {saved.num_read_bytes / 2**30:.2f} GiB"
    )
    return 0


def _show(fraction: float) -> None:
    """Shows how far the work is where someone looks."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{fraction:4.0%}" + ("\n" if fraction == 1 else ""))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenloom quantize",
        description="Writes a quantized copy of a checkpoint in bitsandbytes' own form, which"
        " transformers loads, too.",
    )
    parser.add_argument("model", metavar="MODEL", help="a local folder or a Hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to make")
    parser.add_argument("--to", required=True, choices=("nf4", "fp4", "int8"), help="format")
    parser.add_argument("--lm-head", action="store_true", help="quantize the head, too")
    parser.add_argument(
        "--nested",
        action="store_true",
        help="keep the scales of 4 bits in 8 bits: files 8 %% smaller, but no less memory",
    )
    default = WorkerOptions().device
    parser.add_argument(
        "--device",
        default=default,
        help=f"cpu, cuda or cuda:N; auto is the first GPU, without one the CPU ({default})",
    )
    return parser
