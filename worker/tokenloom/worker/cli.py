"""The `worker` command: one process, one device.

What to load comes from the core with Configure; the options say what belongs to
this machine. torch is imported after they are parsed, so that --help is quick.
"""

from __future__ import annotations

import argparse
import logging
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tokenloom.wire.logs import add_log_options, set_up_logs
from tokenloom.wire.started import process_start_s
from tokenloom.worker.errors import LoadError
from tokenloom.worker.kernel_cache import keep_kernels
from tokenloom.worker.link import add_link_options, core_address
from tokenloom.worker.loop import EXIT_LOAD_FAILED, serve
from tokenloom.worker.options import (
    ATTENTION_NAMES,
    CPU_KV_CACHE,
    WorkerOptions,
    argument,
    default_cpu_threads,
    host_towards,
    parse_bytes,
    parse_count,
    parse_fraction,
)
from tokenloom.worker.phases import Phases
from tokenloom.worker.standby import stand_by

if TYPE_CHECKING:
    from tokenloom.worker.profile import ProfiledRunner
    from tokenloom.worker.runner import ModelRunner

_log = logging.getLogger(__name__)


def worker(argv: list[str] | None = None) -> int:
    """Runs a worker until the core ends it; returns its exit code.

    0 after Shutdown or SIGTERM, or if it stood by in vain; 2 if the device or the model cannot be
    used or an option is wrong; 1 if something else failed in loading or in a step.
    """
    args = _parser().parse_args(argv)
    set_up_logs("worker", form=args.log_format, level=args.log_level)
    start_s = process_start_s()
    if args.standby:
        if not stand_by():
            return 0
        start_s = time.monotonic()
    phases = Phases("imports", start_s)
    try:
        core = core_address(args)
        keep_kernels(args.kernel_cache)
        options = WorkerOptions(
            device=args.device,
            attention=args.attention,
            graphs=args.cuda_graphs,
            kv_cache_bytes=args.kv_cache_bytes,
            kv_memory_fraction=args.kv_memory_fraction,
            host=args.host or host_towards(args.connect),
        )
        runner = _runner(options, phases, args.cpu_threads)
    except LoadError as error:
        _log.error("%s", error)
        return EXIT_LOAD_FAILED
    with _profiled(runner, args) as serving:
        return serve(
            serving,
            recorder=serving,
            core=core,
            device=str(runner.device),
            address=runner.address,
            phases=phases,
            spin_us=args.spin_us,
        )


def _runner(options: WorkerOptions, phases: Phases, cpu_threads: int) -> ModelRunner:
    """Returns a runner that has its device. Raises LoadError."""
    # torch takes seconds to import, which --help must not cost.
    import torch

    from tokenloom.worker.runner import ModelRunner

    torch.set_num_threads(cpu_threads)
    phases.begin("device")
    return ModelRunner(options)


def _profiled(runner: ModelRunner, args: argparse.Namespace) -> ProfiledRunner:
    """Returns the runner with what can trace its steps, from the first on if that is asked for."""
    from tokenloom.worker.profile import ProfiledRunner

    serving = ProfiledRunner(runner, device=runner.device)
    if args.profile is not None:
        serving.write(args.profile, num_steps=args.profile_steps, num_skipped=args.profile_skip)
    return serving


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    defaults = WorkerOptions()
    parser = argparse.ArgumentParser(
        prog="tokenloom worker",
        description="Computes on one device what a scheduler's core decides.",
        formatter_class=_HelpFormatter,
    )
    add_link_options(parser)
    add_log_options(parser)
    parser.add_argument(
        "--host",
        metavar="HOST",
        help="name or address of this machine for the other ranks of a model (default: the one"
        " from which it reaches the core)",
    )
    parser.add_argument(
        "--device",
        default=defaults.device,
        help="cpu, cuda or cuda:N; auto is the first GPU, without one the CPU",
    )
    parser.add_argument(
        "--attention",
        choices=ATTENTION_NAMES,
        default=defaults.attention,
        help="backend; auto is the fastest that works here",
    )
    parser.add_argument(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        default=defaults.graphs,
        help="capture steps as CUDA graphs; without, each kernel is launched by itself",
    )
    parser.add_argument(
        "--cpu-threads",
        type=argument(partial(parse_count, at_least=1)),
        default=default_cpu_threads(),
        metavar="N",
        help="threads that compute on a CPU; half of the CPUs leaves some to the scheduler",
    )
    parser.add_argument(
        "--spin-us",
        type=argument(parse_count),
        metavar="MICROSECONDS",
        help="stay awake between steps shorter than this (default: 1000 with at least 8 CPUs,"
        " else 0)",
    )
    parser.add_argument(
        "--kv-cache-bytes",
        type=argument(parse_bytes),
        metavar="SIZE",
        help=f"size of the KV pool, such as 1GiB; without it by fraction on a GPU, {CPU_KV_CACHE}"
        " on a CPU",
    )
    parser.add_argument(
        "--kv-memory-fraction",
        type=argument(parse_fraction),
        default=defaults.kv_memory_fraction,
        metavar="FRACTION",
        help="part of the GPU memory free after loading that the KV pool takes",
    )
    parser.add_argument(
        "--kernel-cache",
        type=Path,
        metavar="DIR",
        help="folder of mode 700 that keeps what is compiled: kernels, and bytecode where Python"
        " has none (default: tokenloom/kernels in the user's cache folder)",
    )
    parser.add_argument(
        "--standby",
        action="store_true",
        help="import everything, and wait for a line on standard input before anything else; if it"
        " ends without one, exit with 0",
    )
    _add_profile_options(parser)
    return parser


def _add_profile_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="folder for a trace of serving steps"
    )
    parser.add_argument(
        "--profile-steps",
        type=argument(partial(parse_count, at_least=1)),
        default=32,
        metavar="N",
        help="steps that are traced",
    )
    parser.add_argument(
        "--profile-skip",
        type=argument(parse_count),
        default=0,
        metavar="N",
        help="steps before them",
    )
