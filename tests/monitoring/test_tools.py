"""Rules and routes, checked by the tools of Prometheus and Alertmanager.

make check-monitoring        # apt-get install prometheus prometheus-alertmanager
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from monitoring.grafana.dashboards import DASHBOARDS, SHOWN_CLASSES
from tests.monitoring.stack import MONITORING, readable_by_debian
from tests.test_monitoring import ALERTS, metrics

PROMETHEUS = MONITORING / "prometheus"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
UNIT_TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
ROUTES = {"critical": "pagerduty", "warning": "slack", "info": "email", "none": "deadman"}


def tool(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=PROMETHEUS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def alertmanager(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration in a form that this machine's Alertmanager can read."""
    folder = tmp_path_factory.mktemp("alertmanager")
    config = (MONITORING / "alertmanager/alertmanager.yml").read_text()
    version = re.search(r"version (\d+)\.(\d+)", tool("amtool", "--version"))
    assert version
    if (int(version[1]), int(version[2])) < (0, 26):
        config = readable_by_debian(config, "http://localhost")
    (folder / "alertmanager.yml").write_text(config)
    shutil.copytree(MONITORING / "alertmanager/templates", folder / "templates")
    return folder / "alertmanager.yml"


def test_the_configuration_is_valid() -> None:
    tool("promtool", "check", "config", "--lint=all", "--lint-fatal", "prometheus.yml")


def test_the_example_for_ones_own_prometheus_is_valid_and_loads_rules_that_work_alone(tmp_path: Path) -> None:
    (example,) = re.findall(
        r"```yaml\n(.*?)```", (MONITORING.parent / "docs/your-prometheus.md").read_text(), re.DOTALL
    )
    (tmp_path / "classifier").mkdir()
    loaded = [Path(name).name for name in yaml.safe_load(example)["rule_files"]]
    recorded, used = set[str](), set[str]()
    for name in loaded:
        shutil.copy(PROMETHEUS / "rules" / name, tmp_path / "classifier")
        rules = [r for g in yaml.safe_load((PROMETHEUS / "rules" / name).read_text())["groups"] for r in g["rules"]]
        recorded |= {rule["record"] for rule in rules if "record" in rule}
        used |= {metric for rule in rules for metric in metrics(rule["expr"]) if ":" in metric}
    (tmp_path / "prometheus.yml").write_text(example)
    tool("promtool", "check", "config", "--lint=all", "--lint-fatal", tmp_path / "prometheus.yml")
    assert used <= recorded
    for job in yaml.safe_load(example)["scrape_configs"]:
        assert re.fullmatch("classifier.+", job["job_name"])


def test_the_rules_pass_the_linter() -> None:
    tool("promtool", "check", "rules", "--lint=all", "--lint-fatal", *RULES)


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.stem)
def test_alerts_fire_and_stay_silent_as_their_unit_tests_say(path: Path) -> None:
    tool("promtool", "test", "rules", path)


@pytest.mark.parametrize(("classes", "lines"), [(10, 10), (30, SHOWN_CLASSES)])
def test_panels_by_class_show_at_most_twenty(classes: int, lines: int, tmp_path: Path) -> None:
    """Over the whole range, in which one class after the other becomes the most frequent."""
    queries = [
        ranged(t["expr"]).replace("$job", "classifier")
        for panel in DASHBOARDS["model"]["panels"]
        for t in panel["targets"]
        if "class_name" in t["expr"]
    ]
    labels = [f'{{job="classifier", class_name="{number}"}}' for number in range(classes)]
    test = {
        "interval": "1m",
        "input_series": [
            {"series": f"classifier_images_total{each}", "values": f"0x{60 + number} 0+{60 + number}x60"}
            for number, each in enumerate(labels)
        ]
        + [{"series": f"classifier:images:baseline{each}", "values": "1x120"} for each in labels],
        "promql_expr_test": [
            {"expr": f"count(last_over_time(({query})[1h:2m]))", "eval_time": "2h", "exp_samples": [{"value": lines}]}
            for query in queries
        ],
    }
    rules = [str(PROMETHEUS / "rules/model.yml")]
    (tmp_path / "test.yml").write_text(
        yaml.safe_dump({"rule_files": rules, "evaluation_interval": "1m", "tests": [test]})
    )
    tool("promtool", "test", "rules", tmp_path / "test.yml")


def ranged(expr: str) -> str:
    """``expr`` with the time range that Grafana puts in."""
    return expr.replace("$__range", "1h")


def test_dashboard_queries_parse(tmp_path: Path) -> None:
    boards = DASHBOARDS.values()
    queries = [ranged(t["expr"]) for board in boards for panel in board["panels"] for t in panel["targets"]]
    rules = [{"record": f"query:{i}", "expr": expr} for i, expr in enumerate(queries)]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    tool("promtool", "check", "rules", tmp_path / "queries.yml")


def test_the_routes_are_valid(alertmanager: Path) -> None:
    tool("amtool", "check-config", alertmanager)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_reaches_the_receiver_of_its_severity(name: str, alertmanager: Path) -> None:
    labels = ALERTS[name]["labels"]
    tool(
        *("amtool", "config", "routes", "test", f"--config.file={alertmanager}"),
        f"--verify.receivers={ROUTES[labels['severity']]}",
        f"alertname={name}",
        *(f"{key}={value}" for key, value in labels.items()),
    )


def test_an_alert_without_severity_is_not_lost(alertmanager: Path) -> None:
    tool(
        "amtool", "config", "routes", "test", f"--config.file={alertmanager}", "--verify.receivers=slack", "alertname=X"
    )
