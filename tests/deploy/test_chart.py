import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import (
    CHART,
    EXAMPLES,
    NAMESPACE,
    VERSIONS,
    Manifest,
    helm_python,
    of_kind,
    pod_templates,
    render,
    validate,
    values_of,
)
from tests.deploy.options import given_options, options_of
from tokenloom.scheduler import cli as scheduler_cli
from tokenloom.worker import cli as worker_cli

SETS = ("cpu", "production", "two-hosts")
RENDERED = {name: render(values_of(name)) for name in SETS}


def containers(name: str) -> list[Manifest]:
    """Returns all containers that a set of values starts."""
    templates = pod_templates(RENDERED[name]).values()
    return [each for template in templates for each in template["spec"]["containers"]]


def selected(selector: dict[str, str], template: Manifest) -> bool:
    """Returns whether a selector takes the pods of a template."""
    labels: dict[str, str] = template["metadata"]["labels"]
    return selector.items() <= labels.items()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("version", VERSIONS)
def test_what_helm_renders_is_what_kubernetes_takes(name: str, version: str) -> None:
    for manifest in RENDERED[name]:
        validate(manifest, version)


@pytest.mark.parametrize("path", ["istio.yaml", "gateway.yaml"])
def test_examples_have_no_field_that_is_not_there(path: str) -> None:
    for manifest in yaml.safe_load_all((EXAMPLES / path).read_text()):
        validate(manifest, VERSIONS[-1])


def test_validation_is_strict() -> None:
    for kind, field in (("Deployment", "replica"), ("ScaledObject", "minReplicas")):
        manifest = of_kind(RENDERED["production"], kind)
        with pytest.raises(Exception, match=field):
            validate(manifest | {"spec": manifest["spec"] | {field: 1}}, VERSIONS[-1])


@pytest.mark.parametrize("name", SETS)
def test_helm_finds_nothing_to_complain_about(name: str) -> None:
    report = helm_python.lint(CHART, values_of(name), strict=True, namespace=NAMESPACE)
    told = [each["error"] for each in report["messages"]]
    assert (report["errors"], told) == ([], ["icon is recommended"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": {"name": ""}}, "/model/name"),
        ({"replcas": 3}, "replcas"),
        ({"options": {"--quantize": "nf4"}}, "--quantize"),
        ({"port": 80}, "/port"),
        ({"hosts": 2, "gpusPerHost": 8}, "workerKeys.secret empty"),
        ({"hosts": 2, "gpusPerHost": 0, "workerKeys": {"secret": "keys"}}, "gpusPerHost 0"),
    ],
)
def test_values_that_cannot_work_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(helm_python.HelmError, match=complaint):
        render({"model": {"name": "m"}} | changes)


@pytest.mark.parametrize("name", SETS)
def test_callers_and_disruption_budget_see_the_servers_and_no_worker(name: str) -> None:
    templates = pod_templates(RENDERED[name])
    service = of_kind(RENDERED[name], "Service")["spec"]["selector"]
    budget = of_kind(RENDERED[name], "PodDisruptionBudget")["spec"]["selector"]["matchLabels"]
    for selector in (service, budget):
        chosen = [part for part, template in templates.items() if selected(selector, template)]
        assert chosen == ["server"]


def test_the_service_of_a_group_is_not_the_one_of_its_callers() -> None:
    """A LeaderWorkerSet would take one of its own name for it, and find nobody who is not ready."""
    manifests = RENDERED["two-hosts"]
    names = [
        of_kind(manifests, kind)["metadata"]["name"] for kind in ("Service", "LeaderWorkerSet")
    ]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", SETS)
def test_every_container_runs_with_the_least_rights(name: str) -> None:
    for template in pod_templates(RENDERED[name]).values():
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(name):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]


@pytest.mark.parametrize("name", SETS)
def test_every_rank_has_a_gpu(name: str) -> None:
    values = {"hosts": 1, "gpusPerHost": 1} | values_of(name)
    num_ranks = values["hosts"] * max(1, values["gpusPerHost"])
    server = containers(name)[0]
    assert f"--tensor-parallel={num_ranks}" in server["args"]
    limits = [each["resources"]["limits"].get("nvidia.com/gpu") for each in containers(name)]
    expected = str(values["gpusPerHost"]) if values["gpusPerHost"] else None
    assert [each for each in limits if each] == [expected] * values["hosts"] * bool(expected)


@pytest.mark.parametrize("name", SETS)
def test_a_pod_has_the_time_that_its_last_requests_may_take(name: str) -> None:
    server = containers(name)[0]
    (grace,) = (each for each in server["args"] if each.startswith("--grace-s="))
    delay = re.search(r"sleep (\d+)", " ".join(server["lifecycle"]["preStop"]["exec"]["command"]))
    assert delay is not None
    for template in pod_templates(RENDERED[name]).values():
        whole_s = template["spec"]["terminationGracePeriodSeconds"]
        assert whole_s > int(grace.partition("=")[2]) + int(delay[1])


def test_probes_ask_by_grpc_and_with_tls_by_command() -> None:
    (plain,) = containers("cpu")
    assert plain["readinessProbe"]["grpc"] == {"port": 50051, "service": ""}
    assert plain["livenessProbe"]["grpc"] == {"port": 50051, "service": "liveness"}
    (secured,) = containers("production")
    command = secured["readinessProbe"]["exec"]["command"]
    assert command[:3] == ["tokenloom", "health", "127.0.0.1:50051"]
    assert "--tls-server-name=llama-tokenloom.models.svc" in command


def test_large_numbers_of_options_stay_whole() -> None:
    rendered = render({"model": {"name": "m"}, "options": {"max-waiting-tokens": 16777216}})
    args = pod_templates(rendered)["server"]["spec"]["containers"][0]["args"]
    assert "--max-waiting-tokens=16777216" in args


def test_scaling_counts_the_replicas_of_this_release_alone() -> None:
    for name, target in (("production", "Deployment"), ("two-hosts", "LeaderWorkerSet")):
        scaled = of_kind(RENDERED[name], "ScaledObject")["spec"]
        workload = of_kind(RENDERED[name], target)
        assert scaled["scaleTargetRef"]["kind"] == target
        assert scaled["scaleTargetRef"]["name"] == workload["metadata"]["name"]
        assert "replicas" not in workload["spec"]
        for trigger in scaled["triggers"]:
            assert (
                '{namespace="models",app_kubernetes_io_instance="llama"}'
                in (trigger["metadata"]["query"])
            )
    monitor = of_kind(RENDERED["production"], "PodMonitor")["spec"]
    assert monitor["podTargetLabels"] == ["app.kubernetes.io/instance"]


@pytest.mark.parametrize("name", SETS)
def test_commands_have_every_option_that_containers_give(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {
        "server": options_of(scheduler_cli.serve, capsys),
        "scheduler": options_of(scheduler_cli.scheduler, capsys),
        "workers": options_of(worker_cli.worker, capsys),
    }
    for container in containers(name):
        assert given_options(container["args"]) - known[container["name"]] == set()


def test_a_worker_that_ends_ends_all_of_its_host(tmp_path: Path) -> None:
    """The container's own command, with a `tokenloom` that notes how it was started."""
    stand_in = tmp_path / "tokenloom"
    stand_in.write_text(f"""#!/bin/sh
echo "$@" >> {tmp_path}/started
case "$*" in *cuda:3*) ;; *) exec sleep 600;; esac
until [ "$(wc -l < {tmp_path}/started)" = 8 ]; do sleep 0.1; done
exit 5
""")
    stand_in.chmod(0o755)
    workers = containers("two-hosts")[-1]
    process = subprocess.Popen(
        [*workers["command"], *workers["args"]],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        start_new_session=True,
    )
    try:
        assert process.wait(30) == 5
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    started = sorted((tmp_path / "started").read_text().splitlines())
    assert [line.rpartition("--device=")[2] for line in started] == [f"cuda:{n}" for n in range(8)]
    assert all(
        "worker --connect=tcp://" in line and "--log-format=json" in line for line in started
    )
