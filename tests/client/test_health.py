from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

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
