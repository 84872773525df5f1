"""The commands `tokenloom serve`, `scheduler`, `keys` and `bearer-token`.

Nothing heavy is imported here: `--help` answers at once, and the processes
that need gRPC, ZeroMQ or torch are started as such.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path

from tokenloom.scheduler.config import ConfigError, SchedulerConfig
from tokenloom.scheduler.ports import shared_port
from tokenloom.scheduler.supervise import Child, Restart, supervise
from tokenloom.wire.logs import add_log_options, set_up_logs

_MAX_SOCKET_PATH_BYTES = 107
"""What Linux takes as the path of a Unix socket."""
_STOP_S = 10.0
"""How long a child may take to end beyond its grace period."""
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")

_DEFAULTS = {field.name: field.default for field in fields(SchedulerConfig)}
_SCHEDULER_OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("listen", str, "address of the gRPC server: HOST:PORT (port 0: a free one) or unix:PATH"),
    (
        "admin_listen",
        str,
        "address of the operators' service, on this host or unix:PATH (default: there is none)",
    ),
    (
        "tls_cert",
        str,
        "file of the server's certificate chain (PEM); with it the server speaks TLS",
    ),
    ("tls_key", str, "file of its key"),
    ("tls_client_ca", str, "file of CAs; with it every client must show a certificate of theirs"),
    ("tenants", str, "TOML file of those who may call; docs/tenants.md has its form"),
    (
        "tenant_stretch",
        float,
        "how much longer others make steps for a tenant that asks for little, as a factor",
    ),
    ("num_fronts", int, "processes that speak gRPC; connections to the port are spread over them"),
    ("served_name", str, "name told to clients (default: the last part of MODEL)"),
    ("dtype", str, "bfloat16, float16, float32, or auto for the checkpoint's own"),
    ("quantize", str, "none, or what matrices are quantized to while loading: nf4, fp4 or int8"),
    (
        "int8_threshold",
        float,
        "activations from which on 8-bit matrices take inputs as they are, slowly (0: never)",
    ),
    ("kv_cache", str, "fp8 for keys and values in 8 bits, which hold twice the context, or auto"),
    ("max_model_tokens", int, "longest prompt + completion (default: what the model allows)"),
    ("max_num_requests", int, "requests that run at once"),
    (
        "max_step_tokens",
        int,
        "tokens that one step computes at most (default: 8192 on CUDA, 2048 on a CPU)",
    ),
    (
        "max_mixed_prompt_tokens",
        int,
        (
            "prompt tokens that a step computes beside decoding requests, unless many wait "
            "(default: by what steps turn out to cost)"
        ),
    ),
    ("max_waiting_requests", int, "requests that may wait; one more is refused"),
    ("max_waiting_tokens", int, "prompt tokens that may wait in all; more are refused"),
    ("max_waiting_bytes", int, "bytes of memory that waiting requests may take"),
    ("max_stream_buffer_tokens", int, "tokens kept for a client that does not read"),
    (
        "spin_us",
        int,
        (
            "microseconds; core and worker stay awake between shorter steps (default: 1000 with at "
            "least 8 CPUs, else 0)"
        ),
    ),
    ("grace_s", float, "seconds that running requests may take to finish after SIGTERM"),
    ("tensor_parallel", int, "workers that hold the model together, each on a GPU of its own"),
    (
        "step_timeout_s",
        float,
        "seconds after which a step counts as hung, unless such steps took long before",
    ),
    (
        "heartbeat_timeout_s",
        float,
        "seconds without an answer after which a worker is lost and a core not alive",
    ),
    ("max_crashes", int, "losses of workers that are made good; one more ends the server"),
    ("crash_window_s", float, "seconds within which they count"),
    ("metrics_listen", str, "where Prometheus finds metrics: HOST:PORT (default: nowhere)"),
    ("gpu_hour_price", float, "what an hour of one GPU costs; then costs have a price"),
    (
        "otlp_endpoint",
        str,
        "where spans go, such as http://localhost:4317 (default: where OTEL_… variables say)",
    ),
)
_OTHER_HOSTS_OPTIONS = (
    ("workers_listen", "tcp://HOST:PORT", "where workers of other hosts join, encrypted by CURVE"),
    ("workers_key", "FILE", "this scheduler's key pair, NAME.key_secret of `tokenloom keys`"),
    ("workers_allowed", "DIR", "folder of the public keys of workers that may join, NAME.key each"),
)
_WORKER_OPTIONS = (
    ("device", "DEVICE", "auto, cpu, cuda or cuda:N"),
    ("attention", "NAME", "attention backend: auto, flash4, flash2, triton or torch"),
    ("cpu_threads", "N", "threads that compute on a CPU"),
    ("kv_cache_bytes", "SIZE", "fixed size of the KV cache, such as 1GiB"),
    ("kv_memory_fraction", "FRACTION", "part of the free GPU memory that the KV cache takes"),
    ("kernel_cache", "DIR", "folder that keeps compiled kernels"),
    ("profile", "DIR", "folder for a trace of serving steps"),
    ("profile_steps", "N", "steps that are traced"),
    ("profile_skip", "N", "steps before them"),
)


def serve(argv: Sequence[str]) -> int:
    """Serves a model on this machine: fronts, core and workers. Returns the exit code."""
    parser = _parser(
        "serve", "Serves a model on this machine: a gRPC server, the scheduler's core, workers."
    )
    parser.add_argument("model", metavar="MODEL", help="a local folder or a Hub id")
    parser.add_argument(
        "--run-dir", help="folder for sockets (default: a fresh one, removed at the end)"
    )
    _add_scheduler_options(parser)
    group = parser.add_argument_group(
        "worker",
        "defaults are the worker's own; `tokenloom worker --help` tells them",
    )
    for name, metavar, text in _WORKER_OPTIONS:
        group.add_argument(_flag(name), metavar=metavar, help=text)
    group.add_argument(
        "--no-cuda-graphs", action="store_true", help="launch each kernel of a step by itself"
    )
    group.add_argument(
        "--standby",
        action=argparse.BooleanOptionalAction,
        help="keep a process beside each worker, some 0.7 GiB of the host's memory, that takes its"
        " place sooner when it is lost (default: yes, but not with --device cpu)",
    )
    args = parser.parse_args(argv)
    if importlib.util.find_spec("tokenloom.worker") is None:
        return _refuse("the worker is not installed; `pip install tokenloom-worker` brings it")
    worker_options = [
        f"{_flag(name)}={getattr(args, name)}"
        for name, _, _ in _WORKER_OPTIONS
        if name != "device" and getattr(args, name) is not None
    ]
    if args.no_cuda_graphs:
        worker_options.append("--no-cuda-graphs")
    worker_options += [
        f"{_flag(name)}={getattr(args, name)}"
        for name in ("spin_us", "log_format", "log_level")
        if getattr(args, name) != _DEFAULTS[name]
    ]
    try:
        devices = _devices(args.device, args.tensor_parallel)
    except ConfigError as error:
        return _refuse(str(error))
    workers = [[*device, *worker_options] for device in devices]
    stand_by = args.device != "cpu" if args.standby is None else args.standby
    return _run(args, workers, stand_by=stand_by)


def scheduler(argv: Sequence[str]) -> int:
    """Runs front and core; workers are started elsewhere. Returns the exit code."""
    parser = _parser(
        "scheduler",
        "Runs the gRPC server and the scheduler's core. "
        "A worker of this host joins with `tokenloom worker --connect ipc://RUN_DIR/worker.sock`.",
    )
    parser.add_argument("--model", required=True, help="a local folder or a Hub id")
    parser.add_argument(
        "--run-dir", required=True, help="folder of mode 700 for sockets; made if absent"
    )
    _add_scheduler_options(parser)
    group = parser.add_argument_group(
        "workers on other hosts", "all three or none; docs/operations.md tells how to set it up"
    )
    for name, metavar, text in _OTHER_HOSTS_OPTIONS:
        group.add_argument(_flag(name), default="", metavar=metavar, help=text)
    return _run(parser.parse_args(argv), [], stand_by=False)


def keys(argv: Sequence[str]) -> int:
    """Makes key pairs for a scheduler and its workers on other hosts. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="tokenloom keys",
        description="Makes key pairs for a scheduler and its workers on other hosts: "
        "NAME.key, which others may know, and NAME.key_secret, which nobody else may.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="where; made if absent")
    parser.add_argument("names", nargs="+", metavar="NAME", help="whose, such as worker-1")
    args = parser.parse_args(argv)
    from tokenloom.scheduler.keys import make_keys

    try:
        for path in make_keys(args.folder, args.names):
            print(path)
    except ConfigError as error:
        return _refuse(str(error))
    return 0


def bearer_token(argv: Sequence[str]) -> int:
    """Makes a bearer token, and what the tenants file has of it. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="tokenloom bearer-token",
        description="Makes a random bearer token: prints it on standard output, and on standard "
        "error its line for the tenants file, from which nobody can tell the token.",
    )
    parser.parse_args(argv)
    from tokenloom.scheduler.bearer import new_token
    from tokenloom.scheduler.tenants import digest_of_token

    made = new_token()
    print(made)
    sys.stderr.write(f'token_sha256 = ["{digest_of_token(made)}"]\n')
    return 0


def _devices(given: str | None, num_workers: int) -> list[list[str]]:
    """Returns the option that tells each worker its device. Raises ConfigError."""
    if num_workers <= 1 or given == "cpu":
        return [[] if given is None else [f"--device={given}"]] * num_workers
    if given not in {None, "auto", "cuda"}:
        raise ConfigError(
            f"device is {given} and tensor_parallel is {num_workers}; several workers take cpu, or "
            "cuda for a GPU each, from the first on"
        )
    return [[f"--device=cuda:{index}"] for index in range(num_workers)]


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults; an option that tells its default itself is left as it is."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in {None, ""} or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"tokenloom {command}", description=description, formatter_class=_HelpFormatter
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_scheduler_options(parser: argparse.ArgumentParser) -> None:
    for name, kind, text in _SCHEDULER_OPTIONS:
        parser.add_argument(
            _flag(name), type=kind, default=_DEFAULTS[name], metavar=name.upper(), help=text
        )
    add_log_options(parser)
    parser.add_argument(
        "--quantize-lm-head",
        action="store_true",
        help="quantize the head, too",
    )
    parser.add_argument(
        "--prefix-cache",
        action=argparse.BooleanOptionalAction,
        default=_DEFAULTS["prefix_cache"],
        help="keep blocks of finished requests and find them again",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="listen without TLS where other hosts reach it; meant for networks that encrypt",
    )
    parser.add_argument(
        "--deadline-admission",
        action=argparse.BooleanOptionalAction,
        default=_DEFAULTS["deadline_admission"],
        help="refuse requests that would not be done by their deadline",
    )


def _run(args: argparse.Namespace, workers: Sequence[Sequence[str]], *, stand_by: bool) -> int:
    """Runs the scheduler, and a worker with each of the given options."""
    set_up_logs("serve", form=args.log_format, level=args.log_level)
    try:
        _check_model(args.model)
        with ExitStack() as held:
            run_dir = held.enter_context(_run_dir(args.run_dir))
            names = [name for name, _, _ in (*_SCHEDULER_OPTIONS, *_OTHER_HOSTS_OPTIONS)]
            given = {name: getattr(args, name) for name in names if name in args}
            config = SchedulerConfig(
                model=args.model,
                run_dir=run_dir,
                quantize_lm_head=args.quantize_lm_head,
                prefix_cache=args.prefix_cache,
                log_format=args.log_format,
                log_level=args.log_level,
                insecure=args.insecure,
                deadline_admission=args.deadline_admission,
                **given,
            )
            if config.num_fronts > 1:
                listen = held.enter_context(shared_port(config.listen))
                config = replace(config, listen=listen)
            if config.metrics_listen:
                held.enter_context(_metrics_dir(Path(config.metrics_dir)))
            python = (sys.executable, "-m", "tokenloom.worker")
            connect = f"--connect={config.worker_endpoint}"
            commands = [(*python, connect, *each) for each in workers]
            return supervise(stages(config, commands, stand_by=stand_by))
    except ConfigError as error:
        return _refuse(str(error))


def stages(
    config: SchedulerConfig, workers: Sequence[tuple[str, ...]], *, stand_by: bool = False
) -> list[list[Child]]:
    """Returns the processes in the order in which they end; `workers` are command lines."""
    python = (sys.executable, "-m")
    fronts = [
        Child(
            name="front" if config.num_fronts == 1 else f"front {number}",
            argv=(*python, "tokenloom.scheduler.front", config.to_json()),
            stop_s=config.grace_s + _STOP_S,
            hurry_signal=signal.SIGUSR1,
            restart=Restart.ALONE,
        )
        for number in range(1, config.num_fronts + 1)
    ]
    if config.admin_listen:
        admin = Child(
            name="admin",
            argv=(*python, "tokenloom.scheduler.admin", config.to_json()),
            stop_s=_STOP_S,
            restart=Restart.ALONE,
        )
        fronts.append(admin)
    core = Child(
        name="core",
        argv=(*python, "tokenloom.scheduler.core", config.to_json()),
        stop_s=_STOP_S,
        tells=bool(workers),
    )
    ranks = [
        Child(
            name="worker" if len(workers) == 1 else f"worker {number}",
            argv=argv,
            stop_s=_STOP_S,
            restart=Restart.TOGETHER,
            standby_argv=(*argv, "--standby") if stand_by else (),
        )
        for number, argv in enumerate(workers, start=1)
    ]
    exporter = Child(
        name="exporter",
        argv=(*python, "tokenloom.scheduler.exporter", config.to_json()),
        stop_s=_STOP_S,
        restart=Restart.ALONE,
    )
    return [fronts, [core], ranks, [exporter] if config.metrics_listen else []]


def _check_model(model: str) -> None:
    """Raises ConfigError for what is neither a checkpoint's folder nor a Hub id."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{model} has no config.json; it is no checkpoint")
    elif not _HUB_ID.fullmatch(model):
        raise ConfigError(f"there is no folder {model}, and that is no Hub id either")


@contextmanager
def _run_dir(given: str | None) -> Iterator[str]:
    """Yields a folder that only this user can enter. Raises ConfigError."""
    if given is None:
        with tempfile.TemporaryDirectory(prefix="tokenloom-") as fresh:
            yield fresh
        return
    folder = Path(given).absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir {folder} cannot be made: {error}") from error
    status = folder.stat()
    if status.st_mode & 0o077 or status.st_uid != os.getuid():
        mode = status.st_mode & 0o777
        raise ConfigError(
            f"run_dir {folder} has mode {mode:o} and belongs to user {status.st_uid}; "
            f"it must be 700 and belong to user {os.getuid()}"
        )
    num_bytes = len(os.fsencode(folder / "worker.sock"))
    if num_bytes > _MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"run_dir {folder} makes socket paths of {num_bytes} bytes; "
            f"at most {_MAX_SOCKET_PATH_BYTES} work"
        )
    yield str(folder)


@contextmanager
def _metrics_dir(folder: Path) -> Iterator[None]:
    """Has a folder where processes write what they measure, without what others left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refuse(message: str) -> int:
    sys.stderr.write(f"tokenloom: {message}\n")
    return 2
