import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema

from tests.architecture.repository import ROOT
from tests.deploy.options import given_options, options_of
from tests.deploy.test_alerts import promtool
from tokenloom.scheduler import cli as scheduler_cli

DEPLOY = ROOT / "deploy"
FILES = ("compose.yaml", "compose.gpu.yaml")
DASHBOARDS = sorted((DEPLOY / "grafana/dashboards").glob("*.json"))


class Loader(yaml.SafeLoader):
    """Reads `!override`, Compose's word for a value that replaces the other file's."""


Loader.add_constructor(
    "!override",
    lambda loader, node: (
        loader.construct_sequence(node, deep=True)
        if isinstance(node, yaml.SequenceNode)
        else loader.construct_mapping(node, deep=True)
        if isinstance(node, yaml.MappingNode)
        else None
    ),
)


def compose(name: str) -> dict[str, Any]:
    """Returns one of the Compose files."""
    with (DEPLOY / name).open() as file:
        content: dict[str, Any] = yaml.load(file, Loader)
        return content


@pytest.mark.parametrize("name", FILES)
def test_compose_files_have_the_form_of_their_specification(name: str) -> None:
    schema = get_builtin_schema("vendor.compose-spec")
    jsonschema.validate(compose(name), schema)
    with pytest.raises(jsonschema.ValidationError, match="replica"):
        jsonschema.validate({"services": {"a": {"deploy": {"replica": 1}}}}, schema)


def test_everything_that_is_mounted_is_there() -> None:
    for service in compose("compose.yaml")["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source


def test_every_service_has_few_rights_and_listens_for_this_host_alone() -> None:
    for name, service in compose("compose.yaml")["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name


@pytest.mark.parametrize("name", FILES)
def test_serve_has_every_option_that_is_given(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = compose(name)["services"]["tokenloom"]["command"]
    assert given_options(command) - options_of(scheduler_cli.serve, capsys) == set()


def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    text = (DEPLOY / "prometheus/prometheus.yaml").read_text()
    config = tmp_path / "prometheus.yaml"
    config.write_text(text.replace("/etc/prometheus", str(DEPLOY / "prometheus")))
    assert "SUCCESS" in promtool("check", "config", config)


def test_grafana_finds_dashboards_and_prometheus_where_compose_puts_them() -> None:
    services = compose("compose.yaml")["services"]
    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    (provider,) = yaml.safe_load((provisioning / "dashboards/tokenloom.yaml").read_text())[
        "providers"
    ]
    mounts = dict(each.split(":")[:2] for each in services["grafana"]["volumes"])
    assert provider["options"]["path"] == mounts["./grafana/dashboards"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).name in {path.name for path in DASHBOARDS}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_leave_nothing_to_the_one_who_imports_them(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        if panel["type"] != "row":
            assert panel["title"]
            assert panel["targets"]
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    variables = {each["name"] for each in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]+)", path.read_text()))
    assert used <= variables


def test_dashboards_are_told_apart() -> None:
    assert len({json.loads(path.read_text())["uid"] for path in DASHBOARDS}) == len(DASHBOARDS) > 0
