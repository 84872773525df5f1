import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.architecture.repository import ROOT
from tests.architecture.test_docs import anchors
from tests.deploy.programs import prometheus_program

RULES = ROOT / "deploy/prometheus/rules.yaml"
UNIT_TESTS = ROOT / "deploy/prometheus/rules_test.yaml"
OPERATIONS = ROOT / "docs/operations.md"


def alerts() -> list[dict[str, Any]]:
    """Returns the alert rules."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def promtool(*arguments: str | Path) -> str:
    """Runs promtool; returns what it printed."""
    done = subprocess.run(
        [prometheus_program("promtool"), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rules_fire_when_they_should_and_only_then() -> None:
    assert "SUCCESS" in promtool("test", "rules", UNIT_TESTS)


def test_every_alert_is_seen_firing_in_a_unit_test() -> None:
    tests = yaml.safe_load(UNIT_TESTS.read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    fired = {case["alertname"] for case in cases if case["exp_alerts"]}
    assert fired == {alert["alert"] for alert in alerts()}


def test_every_alert_leads_to_its_own_runbook() -> None:
    sections = anchors(OPERATIONS.read_text())
    for alert in alerts():
        page, _, section = alert["annotations"]["runbook"].partition("#")
        assert (ROOT / page, section) == (OPERATIONS, alert["alert"].lower())
        assert section in sections, f"{page} has no section {alert['alert']}"


def test_every_runbook_belongs_to_an_alert() -> None:
    runbooks = set(re.findall(r"^#+ (Tokenloom\w+)$", OPERATIONS.read_text(), re.MULTILINE))
    assert runbooks == {alert["alert"] for alert in alerts()}
