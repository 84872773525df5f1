from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import grpc
import pytest

from tokenloom.scheduler import cli
from tokenloom.scheduler.config import SchedulerConfig
from tokenloom.scheduler.supervise import Child
from tokenloom.scheduler.tenants import Tenants
from tokenloom.v1 import inference_pb2 as pb
from tokenloom.v1.inference_pb2_grpc import InferenceStub
from tokenloom.wire.keys import read_key_pair, read_public_key


class Started:
    """What `supervise` was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.children: list[Child] = []
        monkeypatch.setattr(cli, "supervise", self._supervise)

    def _supervise(self, stages: list[list[Child]]) -> int:
        self.children = [child for stage in stages for child in stage]
        self.run_dir_mode = Path(self.config.run_dir).stat().st_mode & 0o777
        return 0

    @property
    def config(self) -> SchedulerConfig:
        return SchedulerConfig.from_json(self.children[0].argv[-1])

    def argv(self, name: str) -> tuple[str, ...]:
        return next(child.argv for child in self.children if child.name == name)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    return Started(monkeypatch)


def test_serve_starts_front_core_and_worker(started: Started, checkpoint: Path) -> None:
    assert cli.serve([str(checkpoint), "--device=cpu", "--kv-cache-bytes", "64MiB"]) == 0
    assert [child.name for child in started.children] == ["front", "core", "worker"]
    assert started.argv("core")[-1] == started.argv("front")[-1]
    assert started.argv("worker")[1:] == (
        "-m",
        "tokenloom.worker",
        f"--connect={started.config.worker_endpoint}",
        "--device=cpu",
        "--kv-cache-bytes=64MiB",
    )
    assert started.config.name == "tiny"


def test_a_fresh_run_dir_is_private_and_removed(started: Started, checkpoint: Path) -> None:
    cli.serve([str(checkpoint)])
    assert started.run_dir_mode == 0o700
    assert not Path(started.config.run_dir).exists()


def test_a_given_run_dir_is_made_private_and_kept(
    started: Started, checkpoint: Path, tmp_path: Path
) -> None:
    assert cli.scheduler(["--model", str(checkpoint), "--run-dir", str(tmp_path / "run")]) == 0
    assert [child.name for child in started.children] == ["front", "core"]
    assert started.run_dir_mode == 0o700
    assert (tmp_path / "run").is_dir()


def test_defaults_are_those_of_the_configuration(started: Started, checkpoint: Path) -> None:
    cli.serve([str(checkpoint)])
    made = started.config
    assert made == SchedulerConfig(model=str(checkpoint), run_dir=made.run_dir)


def test_every_field_of_the_configuration_has_an_option(
    started: Started, checkpoint: Path, tmp_path: Path
) -> None:
    settings: dict[str, object] = {
        "served_name": "parrot",
        "tls_cert": "server.pem",
        "tls_key": "server.key",
        "tls_client_ca": "clients.pem",
        "tenants": "tenants.toml",
        "tenant_stretch": 2.5,
        "num_fronts": 2,
        "dtype": "float32",
        "quantize": "nf4",
        "int8_threshold": 6.0,
        "kv_cache": "fp8",
        "max_model_tokens": 77,
        "max_num_requests": 5,
        "max_step_tokens": 6,
        "max_mixed_prompt_tokens": 4,
        "max_waiting_requests": 7,
        "max_waiting_tokens": 8,
        "max_waiting_bytes": 10,
        "max_stream_buffer_tokens": 9,
        "spin_us": 123,
        "grace_s": 1.5,
        "tensor_parallel": 2,
        "step_timeout_s": 2.5,
        "heartbeat_timeout_s": 3.5,
        "max_crashes": 0,
        "crash_window_s": 4.5,
        "admin_listen": "127.0.0.1:50052",
        "metrics_listen": "127.0.0.1:9464",
        "gpu_hour_price": 2.5,
        "log_format": "json",
        "log_level": "error",
        "otlp_endpoint": "http://localhost:4317",
    }
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    run_dir = tmp_path / "run"
    flags = ["--no-prefix-cache", "--no-deadline-admission", "--quantize-lm-head"]
    options += ["--listen=0.0.0.0:0", "--insecure", *flags]
    cli.serve([str(checkpoint), f"--run-dir={run_dir}", *options])
    for field in fields(SchedulerConfig):
        if field.name in settings:
            assert getattr(started.config, field.name) == settings[field.name]
        elif not field.name.startswith("workers_"):  # `serve` starts its workers itself
            flags_too = {"insecure", "prefix_cache", "deadline_admission", "quantize_lm_head"}
            assert field.name in flags_too | {"model", "run_dir", "listen"}
    assert not started.config.prefix_cache
    assert not started.config.deadline_admission
    assert started.config.quantize_lm_head
    assert started.config.insecure
    host, port = started.config.listen.split(":")
    assert host == "0.0.0.0"
    assert int(port) > 0  # known before two fronts share it
    for number in (1, 2):
        assert started.argv(f"worker {number}")[-4:] == (
            f"--device=cuda:{number - 1}",
            "--spin-us=123",
            "--log-format=json",
            "--log-level=error",
        )
    assert started.config.run_dir == str(run_dir)


OTHER_HOSTS = {
    "workers_listen": "tcp://10.0.0.1:5555",
    "workers_key": "scheduler.key_secret",
    "workers_allowed": "allowed",
}


def scheduler_of(checkpoint: Path, tmp_path: Path, settings: dict[str, str]) -> int:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return cli.scheduler(["--model", str(checkpoint), "--run-dir", str(tmp_path / "run"), *options])


def test_scheduler_takes_workers_of_other_hosts(
    started: Started, checkpoint: Path, tmp_path: Path
) -> None:
    assert scheduler_of(checkpoint, tmp_path, OTHER_HOSTS) == 0
    for name, value in OTHER_HOSTS.items():
        assert getattr(started.config, name) == value


def test_tcp_without_keys_is_refused(
    started: Started, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for absent in OTHER_HOSTS:
        given = {name: value for name, value in OTHER_HOSTS.items() if name != absent}
        assert scheduler_of(checkpoint, tmp_path, given) == 2
        assert f"{absent} must be given, too" in capsys.readouterr().err
    for listen in ("10.0.0.1:5555", "ipc:///tmp/socket"):
        given = OTHER_HOSTS | {"workers_listen": listen}
        assert scheduler_of(checkpoint, tmp_path, given) == 2
        assert "it must be tcp://HOST:PORT" in capsys.readouterr().err
    assert started.children == []


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--metrics-listen=9464", "metrics_listen is '9464'; it must be HOST:PORT"),
        ("--metrics-listen=unix:/tmp/x", "it must be HOST:PORT"),
        ("--gpu-hour-price=-1", "gpu_hour_price is -1.0; it must be 0 or a positive number"),
        ("--gpu-hour-price=nan", "gpu_hour_price is nan"),
    ],
)
def test_metrics_without_an_address_and_prices_below_nothing_are_refused(
    started: Started,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    complaint: str,
) -> None:
    assert cli.serve([str(checkpoint), option]) == 2
    assert complaint in capsys.readouterr().err
    assert started.children == []


def test_the_exporter_starts_when_metrics_are_wanted_and_ends_last(
    started: Started, checkpoint: Path
) -> None:
    cli.serve([str(checkpoint), "--listen=127.0.0.1:0"])
    assert "exporter" not in [child.name for child in started.children]
    cli.serve([str(checkpoint), "--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0"])
    assert started.children[-1].name == "exporter"


def test_keys_are_made_for_their_owner_alone_and_never_over_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "keys"
    assert cli.keys([str(folder), "scheduler", "worker-1"]) == 0
    made = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(made) == sorted(folder.iterdir())
    secrets = [path for path in made if path.suffix == ".key_secret"]
    assert [path.stem for path in secrets] == ["scheduler", "worker-1"]
    pairs = [read_key_pair(path) for path in secrets]  # refuses what others can read
    assert [read_public_key(folder / f"{path.stem}.key") for path in secrets] == [
        pair.public for pair in pairs
    ]
    assert len({pair.secret for pair in pairs}) == 2
    assert cli.keys([str(folder), "worker-2", "worker-1"]) == 2
    assert "worker-1.key is there already" in capsys.readouterr().err
    assert cli.keys([str(folder), "../worker-3"]) == 2
    assert "'../worker-3' is no name of a file" in capsys.readouterr().err
    assert sorted(made) == sorted(folder.iterdir())


@pytest.mark.parametrize(
    "listen", ["127.0.0.1:0", "127.3.2.1:50051", "[::1]:0", "localhost:50051", "unix:/tmp/s"]
)
def test_plaintext_is_for_this_host_alone(started: Started, checkpoint: Path, listen: str) -> None:
    assert cli.serve([str(checkpoint), f"--listen={listen}"]) == 0
    assert started.config.listen == listen


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:50051", "[::]:50051", "10.0.0.1:50051", "a-host:50051", ":50051"]
)
def test_other_hosts_are_served_with_tls_or_on_purpose_without(
    started: Started, checkpoint: Path, capsys: pytest.CaptureFixture[str], listen: str
) -> None:
    options = [str(checkpoint), f"--listen={listen}"]
    assert cli.serve(options) == 2
    assert f"listen is {listen}, which other hosts may reach" in capsys.readouterr().err
    assert started.children == []
    assert cli.serve([*options, "--insecure"]) == 0
    assert cli.serve([*options, "--tls-cert=server.pem", "--tls-key=server.key"]) == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--tls-cert=server.pem"], "tls_key must be given, too"),
        (["--tls-key=server.key"], "tls_cert must be given, too"),
        (["--tls-client-ca=ca.pem"], "tls_client_ca needs tls_cert"),
    ],
)
def test_half_of_tls_is_refused(
    started: Started,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    told: str,
) -> None:
    assert cli.serve([str(checkpoint), *options]) == 2
    assert told in capsys.readouterr().err
    assert started.children == []


def test_a_token_is_told_once_and_its_digest_is_a_line_of_the_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = []
    for _ in range(2):
        assert cli.bearer_token([]) == 0
        told = capsys.readouterr()
        made.append(told.out.strip())
        tenant = Tenants.parse(f"[tenants.a]\n{told.err}").with_token(made[-1])
        assert tenant is not None
        assert made[-1] not in told.err
    assert len(set(made)) == 2
    assert all(len(token) == 43 for token in made)  # 256 bits


def test_bad_options_are_refused_with_code_2(
    started: Started,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    open_dir = tmp_path / "open"
    open_dir.mkdir()
    open_dir.chmod(0o755)
    model = str(checkpoint)
    cases = [
        ([str(tmp_path / "none")], "there is no folder"),
        ([str(tmp_path)], "has no config.json"),
        ([model, "--max-num-requests=0"], "max_num_requests is 0; it must be at least 1"),
        ([model, "--max-num-requests=8193"], "max_num_requests is 8193; it must be at most 8192"),
        ([model, "--quantize=int4"], "quantize is 'int4'; it must be one of none, nf4, fp4, int8"),
        ([model, "--kv-cache=int8"], "kv_cache is 'int8'; it must be one of auto, fp8"),
        ([model, f"--run-dir={open_dir}"], "has mode 755"),
        ([model, f"--run-dir={tmp_path / ('x' * 200)}"], "at most 107 work"),
        ([model, f"--run-dir={checkpoint / 'config.json'}"], "cannot be made"),
    ]
    for argv, part in cases:
        assert cli.serve(argv) == 2
        assert part in capsys.readouterr().err
    assert started.children == []


@pytest.mark.parametrize("command", ["serve", "scheduler"])
def test_help_shows_defaults_and_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys\n"
        "from tokenloom.scheduler import __main__ as main\n"
        f"try: main.main(['{command}', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'grpc', 'zmq', 'numpy', 'asyncio', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "(default: 127.0.0.1:50051)" in " ".join(shown.split())
    assert "--max-model-tokens" in shown


def test_a_wrong_worker_option_ends_serve_with_its_explanation(checkpoint: Path) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "tokenloom.scheduler", "serve", str(checkpoint)),
            *("--listen=127.0.0.1:0", "--kv-memory-fraction", "2"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert "2 is no fraction above 0 and up to 1" in result.stderr
    assert "Traceback" not in result.stderr


def test_scheduler_and_a_worker_started_on_its_own_serve(checkpoint: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    scheduler = subprocess.Popen(
        [
            *(sys.executable, "-m", "tokenloom.scheduler", "scheduler"),
            *("--model", str(checkpoint), "--run-dir", str(run_dir), "--listen=127.0.0.1:0"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    worker = subprocess.Popen(
        [
            *(sys.executable, "-m", "tokenloom.worker.fake"),
            f"--connect=ipc://{run_dir}/worker.sock",
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        address = run_dir / "address"
        deadline = time.monotonic() + 60
        while not address.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with grpc.insecure_channel(address.read_text()) as channel:
            stopping = pb.Stopping(max_tokens=20, ignore_eos=True)
            request = pb.GenerateRequest(text="The quick", stopping=stopping)
            events = _generate_when_ready(InferenceStub(channel), request)
        assert events[0].HasField("admission")
        assert events[-1].finish.usage.num_completion_tokens == 20
        scheduler.send_signal(signal.SIGTERM)
        _, log = scheduler.communicate(timeout=30)
        assert scheduler.returncode == 0, log
        assert "serving tiny on 127.0.0.1:" in log
        assert worker.wait(timeout=30) == 0  # told by the core
        assert not address.exists()
    finally:
        for process in (scheduler, worker):
            process.kill()
            process.communicate()


def _generate_when_ready(
    stub: InferenceStub, request: pb.GenerateRequest
) -> list[pb.GenerateResponse]:
    deadline = time.monotonic() + 60
    while True:
        try:
            return list(stub.Generate(request))
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
