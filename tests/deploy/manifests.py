"""Kubernetes manifests: Helm's rendering of the chart, and strict validation."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.architecture.repository import ROOT

helm_python = pytest.importorskip("helm_python", reason="comes for x86-64 and for macOS only")

CHART = ROOT / "deploy/chart/tokenloom"
EXAMPLES = ROOT / "deploy/examples"
VERSIONS = ("1.29", "1.37")
"""Of Kubernetes: the oldest that Chart.yaml allows, and the newest whose schemas are there."""
RELEASE, NAMESPACE = "llama", "models"

Manifest = dict[str, Any]
Values = Mapping[str, Any]

_CUSTOM = yaml.safe_load((Path(__file__).parent / "custom_resources.yaml").read_text())


def values_of(name: str) -> dict[str, Any]:
    """Returns one of the examples' sets of values."""
    values: dict[str, Any] = yaml.safe_load((EXAMPLES / f"values-{name}.yaml").read_text())
    return values


def render(values: Values) -> list[Manifest]:
    """Returns what Helm makes of the chart. Raises helm_python's errors."""
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(dict(values))
        files = chart.render(dict(values), name=RELEASE, namespace=NAMESPACE)
    texts = (text for name, text in files.items() if name.endswith(".yaml"))
    return [each for text in texts for each in yaml.safe_load_all(text) if each]


def of_kind(manifests: list[Manifest], kind: str) -> Manifest:
    """Returns the one manifest of a kind."""
    (found,) = (each for each in manifests if each["kind"] == kind)
    return found


def pod_templates(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Returns the pods that the chart starts, by component."""
    found: dict[str, Manifest] = {}
    for each in manifests:
        if each["kind"] == "Deployment":
            found["server"] = each["spec"]["template"]
        if each["kind"] == "LeaderWorkerSet":
            group = each["spec"]["leaderWorkerTemplate"]
            found |= {"server": group["leaderTemplate"], "worker": group["workerTemplate"]}
    return found


def validate(manifest: Manifest, version: str) -> None:
    """Raises ValidationError for a field that Kubernetes, or the resource's project, lacks."""
    for each in _with_embedded(manifest):
        schema = _CUSTOM["kinds"].get(f"{each['apiVersion']} {each['kind']}")
        if schema is None:
            kubernetes_validate.validate(each, version, strict=True)
        else:
            jsonschema.validate(each, _whole(schema))


def _whole(spec: Manifest) -> Manifest:
    """Returns the schema of a custom resource with this schema of its `spec`."""
    return {
        "definitions": _CUSTOM["definitions"],
        "type": "object",
        "required": ["metadata", "spec"],
        "additionalProperties": False,
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"$ref": "#/definitions/metadata"},
            "spec": spec | {"type": "object", "additionalProperties": False},
        },
    }


def _with_embedded(manifest: Manifest) -> Iterator[Manifest]:
    """Yields a manifest, and those of Kubernetes' own kinds that have its parts."""
    yield manifest
    if manifest["kind"] == "LeaderWorkerSet":
        for template in pod_templates([manifest]).values():
            selector = {"matchLabels": template["metadata"]["labels"]}
            yield {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "metadata": {"name": "embedded"},
                "spec": {"selector": selector, "template": copy.deepcopy(template)},
            }
    if manifest["kind"] == "ScaledObject":
        spec = manifest["spec"]
        yield {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": "embedded"},
            "spec": {
                "maxReplicas": spec["maxReplicaCount"],
                "scaleTargetRef": spec["scaleTargetRef"],
                **spec["advanced"]["horizontalPodAutoscalerConfig"],
            },
        }
