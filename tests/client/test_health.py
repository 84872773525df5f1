from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from cryptography.x509 import DNSName
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.certificates import CA, put
from tokenloom.client.cli import main

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def server() -> Iterator[grpc.Server]:
    """Lives, and is not ready."""
    servicer = health.HealthServicer()
    servicer.set("", NOT_SERVING)
    servicer.set("liveness", SERVING)
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    yield server
    server.stop(None)


def test_exit_status_says_whether_the_service_serves(
    server: grpc.Server, capfd: pytest.CaptureFixture[str]
) -> None:
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    assert main(["health", target]) == 1
    assert main(["health", target, "--service", "liveness"]) == 0
    assert capfd.readouterr().out == "not serving\nserving\n"
    assert main(["health", target, "--service", "unheard-of"]) == 1
    assert "NOT_FOUND" in capfd.readouterr().err


def test_server_that_is_not_there_does_not_serve(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "127.0.0.1:1", "--timeout-s", "1"]) == 1
    assert "127.0.0.1:1: " in capfd.readouterr().err


def test_server_with_tls_is_asked_by_its_own_name(
    server: grpc.Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ca = CA("ours")
    issued = ca.issue([DNSName("model.example")])
    ca_file = put(tmp_path / "ca.crt", ca.pem)
    pair = ca.client("spiffe://example.org/pod").write(tmp_path, "pod")
    credentials = grpc.ssl_server_credentials(
        [(issued.key, issued.cert)], ca.pem, require_client_auth=True
    )
    target = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
    server.start()
    asked = ("health", target, "--service=liveness", f"--tls-ca={ca_file}")
    shown = (f"--tls-cert={pair[0]}", f"--tls-key={pair[1]}")
    assert main([*asked, *shown, "--tls-server-name=model.example"]) == 0
    assert main([*asked, *shown]) == 1  # 127.0.0.1 is not the certificate's name
    assert main([*asked, "--tls-server-name=model.example"]) == 1  # no certificate is shown
    with pytest.raises(SystemExit):
        main([*asked, f"--tls-cert={tmp_path / 'absent'}", f"--tls-key={pair[1]}"])
    assert "absent" in capfd.readouterr().err
