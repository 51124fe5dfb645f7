"""The files of monitoring/ agree with each other and with a real run's metrics. tests/monitoring runs their tools."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring.grafana.dashboards import DASHBOARDS, FOLDER, text
from monitoring.grafana.logs import DASHBOARD
from serving.metrics import REASONS

ALL_DASHBOARDS = {**DASHBOARDS, "logs": DASHBOARD}
REPOSITORY = Path(__file__).parent.parent
MONITORING = REPOSITORY / "monitoring"
RULES = {path: yaml.safe_load(path.read_text()) for path in (MONITORING / "prometheus/rules").glob("*.yml")}
ALERTS = {r["alert"]: r for d in RULES.values() for g in d["groups"] for r in g["rules"] if "alert" in r}
RECORDED = {r["record"] for d in RULES.values() for g in d["groups"] for r in g["rules"] if "record" in r}
SCRAPE_CONFIGS = yaml.safe_load((MONITORING / "prometheus/prometheus.yml").read_text())["scrape_configs"]
JOBS = {config["job_name"] for config in SCRAPE_CONFIGS}
CASES = [
    case
    for path in (MONITORING / "prometheus/tests").glob("*.yml")
    for case in yaml.safe_load(path.read_text())["tests"]
]
SCRAPED = set((REPOSITORY / "tests/monitoring/metric-names.txt").read_text().split())
"""Every metric that Prometheus had after a real run, as recorded by `UPDATE=1 make e2e-alerts`."""
GPU = set(re.findall(r"^DCGM\w+", (MONITORING / "dcgm/counters.csv").read_text(), re.MULTILINE))
"""What dcgm-exporter is configured to export: the recorded run has no GPU."""
SEVERITIES = {"critical", "warning", "info", "none"}
HEADINGS = ["## Meaning", "## Impact", "## Diagnosis", "## Mitigation"]

_NOT_A_NAME = re.compile(
    r'"[^"]*"|\{[^}]*\}|\[[^]]*\]|\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)|\b(and|or|unless|offset|bool)\b'
)
_NAME = re.compile(r"(?<![\w:])[a-zA-Z_:][\w:]*(?![\w:]|\s*\()")


def metrics(expr: str) -> set[str]:
    """The metric names of a PromQL expression: identifiers other than functions, labels, keywords and durations."""
    return set(_NAME.findall(_NOT_A_NAME.sub(" ", expr)))


def expressions() -> Iterator[tuple[str, str]]:
    for path, document in RULES.items():
        for group in document["groups"]:
            for rule in group["rules"]:
                yield f"{path.name}: {rule.get('alert') or rule['record']}", rule["expr"]
    for name, board in DASHBOARDS.items():
        for panel in board["panels"]:
            for target in panel["targets"]:
                yield f"{name}.json: {panel['title']}", target["expr"]


def test_metric_names_are_distinguished_from_functions_labels_and_durations() -> None:
    expr = 'sum by (le) (rate(a:b_total{job="x"}[5m] offset 1d)) / on (i) group_left () (c > 0) or vector(1)'
    assert metrics(expr) == {"a:b_total", "c"}


@pytest.mark.parametrize(("where", "expr"), list(expressions()))
def test_an_expression_uses_only_metrics_that_exist(where: str, expr: str) -> None:
    unknown = metrics(expr) - SCRAPED - RECORDED - GPU
    assert not unknown, where


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_it_is_and_what_to_do(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in SEVERITIES
    assert alert["labels"]["component"]
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["description"]
    page = (REPOSITORY / alert["annotations"]["runbook_url"]).read_text().splitlines()
    assert page[0] == f"# {name}"
    assert [line for line in page if line.startswith("## ")] == HEADINGS


def test_no_runbook_is_orphaned_and_no_link_is_broken() -> None:
    pages = {path.stem: path.read_text() for path in (MONITORING / "runbooks").glob("*.md")}
    assert pages.keys() == ALERTS.keys()
    assert {link for page in pages.values() for link in re.findall(r"\]\((\w+)\.md\)", page)} <= pages.keys()


def commands() -> Iterator[tuple[str, str]]:
    """What the runbooks quote in backticks, each with the name of its page."""
    for path in (MONITORING / "runbooks").glob("*.md"):
        yield from ((path.stem, command) for command in re.findall(r"`([^`]+)`", path.read_text()))


def test_panels_named_in_runbooks_exist() -> None:
    titles = {board["title"] for board in DASHBOARDS.values()}
    titles |= {panel["title"] for board in DASHBOARDS.values() for panel in board["panels"]}
    pages = (re.sub(r"`[^`]+`", "", path.read_text()) for path in (MONITORING / "runbooks").glob("*.md"))
    named = {name for page in pages for name in re.findall(r'"([^"]+)"', page)}
    assert {"Burn rate", "Disk used"} <= named
    assert named <= titles


def test_kubectl_in_runbooks_names_the_namespace_and_the_resource() -> None:
    asked = [command for _, command in commands() if command.startswith("kubectl")]
    assert asked
    for command in asked:
        assert re.search(r" -n (classifier|gpu-operator)$", command), command
        assert "rollout" not in command or re.search(r"rollout (status|restart) \w+/|rollout classifier", command), (
            command
        )


def test_names_that_only_compose_resolves_are_used_inside_compose() -> None:
    files = (REPOSITORY / "deploy").glob("compose*.yaml")
    names = "|".join({name for file in files for name in yaml.safe_load(file.read_text())["services"]})
    inside = [command for _, command in commands() if re.search(rf"//({names})[:/]", command)]
    assert inside
    assert all(command.startswith("docker compose exec ") for command in inside)


def test_no_runbook_deletes_the_image_needed_for_a_rollback() -> None:
    """`docker image prune -a` deletes every image that is not running."""
    for name, command in commands():
        assert not re.search(r"prune\b.* (-a|--all)\b|system prune", command), name


def inhibited(source: dict[str, str], target: dict[str, str]) -> bool:
    """Whether Alertmanager suppresses the alert with labels ``target`` while the one with labels ``source`` fires."""

    def matches(labels: dict[str, str], matchers: list[str]) -> bool:
        for matcher in matchers:
            name, operator, value = re.fullmatch(r'(\w+)(=~|!=|=)"(.*)"', matcher).groups()
            if bool(re.fullmatch(value, labels.get(name, ""))) == (operator == "!="):
                return False
        return True

    rules = yaml.safe_load((MONITORING / "alertmanager/alertmanager.yml").read_text())["inhibit_rules"]
    return any(
        matches(source, rule["source_matchers"])
        and matches(target, rule["target_matchers"])
        and all(source.get(label) == target.get(label) for label in rule.get("equal", []))
        for rule in rules
    )


def test_one_failing_replica_pages_once_and_gpu_alerts_hide_no_others() -> None:
    def labels(name: str) -> dict[str, str]:
        return {"alertname": name, "instance": "one", **ALERTS[name]["labels"]}

    assert inhibited(labels("ClassifierNotReady"), labels("ClassifierRejecting"))
    assert not inhibited(labels("ClassifierNotReady"), labels("ClassifierRejecting") | {"instance": "another"})
    of_gpus = [name for name in ALERTS if name.startswith("Gpu")]
    assert not any(inhibited(labels(a), labels(b)) for a in of_gpus for b in of_gpus)


def test_a_missing_classifier_hides_its_own_alerts_alone() -> None:
    def labels(name: str, job: str) -> dict[str, str]:
        return {"alertname": name, **ALERTS[name]["labels"], "job": job}

    for name in ("ClassifierInstanceDown", "ClassifierReplicasLost", "SloBudgetBurnFast"):
        assert inhibited(labels("ClassifierDown", "classifier-cats"), labels(name, "classifier-cats"))
        assert not inhibited(labels("ClassifierDown", "classifier-cats"), labels(name, "classifier-flowers"))
    assert inhibited(labels("ClassifierDown", "classifier"), labels("EdgeProbeFailing", "edge"))
    assert not inhibited(labels("ClassifierDown", "classifier-cats"), labels("EdgeProbeFailing", "edge"))
    assert not [
        job for job in JOBS if inhibited(labels("ClassifierDown", "classifier"), labels("TargetsVanished", job))
    ]


def test_a_fast_burning_budget_hides_the_slow_alert_of_the_same_service() -> None:
    fast, slow = ({"alertname": f"SloBudgetBurn{pace}", "slo": "latency"} for pace in ("Fast", "Slow"))
    assert inhibited(fast | {"job": "classifier-cats"}, slow | {"job": "classifier-cats"})
    assert not inhibited(fast | {"job": "classifier-cats"}, slow | {"job": "classifier-flowers"})


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_has_a_unit_test_that_fires_and_one_that_stays_silent(name: str) -> None:
    samples = [s["labels"] for c in CASES for e in c.get("promql_expr_test", []) for s in e["exp_samples"]]
    assert any(f'alertname="{name}"' in labels for labels in samples), "never fires"
    silent = {t["alertname"] for c in CASES for t in c.get("alert_rule_test", []) if not t.get("exp_alerts")}
    assert name in silent or name == "Watchdog", "never silent"  # Watchdog always fires


def test_jobs_in_expressions_are_scraped() -> None:
    asked = {
        job for _, expr in expressions() for jobs in re.findall(r'job=~?"([^$"]+)"', expr) for job in jobs.split("|")
    }
    assert {"classifier.*", "edge"} <= asked
    assert not [job for job in asked if not any(re.fullmatch(job, scraped) for scraped in JOBS)]


@pytest.mark.parametrize("name", ["TargetDown", "TargetsVanished"])
def test_every_job_of_the_stack_but_the_classifier_is_watched_and_no_other(name: str) -> None:
    (jobs,) = re.findall(r'up\{job=~"([^"]+)"\}', ALERTS[name]["expr"])
    assert set(jobs.split("|")) == JOBS - {"classifier"}


@pytest.mark.parametrize("file", ["service.yml", "slo.yml", "model.yml"])
def test_rules_about_a_service_keep_services_apart(file: str) -> None:
    found = [
        (where, labels)
        for where, expr in expressions()
        if where.startswith(f"{file}: ")
        for labels in re.findall(r"\b(?:sum|count|group|avg|min|max)\b(?: by \(([^)]*)\))?(?= ?\()", expr)
    ]
    assert found
    assert not [where for where, labels in found if "job" not in labels.split(", ")]


def test_rejection_reasons_in_alerts_are_counted_from_0() -> None:
    asked = re.findall(r'classifier_rejected_total\{reason=~?"([^"]+)"', " ".join(expr for _, expr in expressions()))
    kinds = [kind for pattern in asked for kind in pattern.split("|")]
    assert "not_ready" in kinds
    assert [kind for kind in kinds if not any(re.fullmatch(kind, reason) for reason in REASONS)] == []


def test_recording_intervals_are_shorter_than_prometheus_lookback() -> None:
    intervals = [g.get("interval", "15s") for d in RULES.values() for g in d["groups"]]
    assert set(intervals) <= {"15s", "30s", "1m", "2m"}  # Prometheus looks back up to 5 minutes for the latest sample


@pytest.mark.parametrize("name", ALL_DASHBOARDS)
def test_dashboards_match_their_source(name: str) -> None:
    """Regenerate with python -m monitoring.grafana.dashboards, and .logs."""
    assert (FOLDER / f"{name}.json").read_text(encoding="utf-8") == text(ALL_DASHBOARDS[name])


def test_dashboards_and_provisioning_agree() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == ALL_DASHBOARDS.keys()
    files = (MONITORING / "grafana/provisioning/datasources").glob("*.yml")
    sources = {source["type"] for file in files for source in yaml.safe_load(file.read_text())["datasources"]}
    assert sources == {
        t["datasource"]["type"] for b in ALL_DASHBOARDS.values() for p in b["panels"] for t in p["targets"]
    }


@pytest.mark.parametrize("name", ALL_DASHBOARDS)
def test_a_dashboard_works_with_a_data_source_of_any_uid(name: str) -> None:
    variables = {v["name"]: v for v in ALL_DASHBOARDS[name]["templating"]["list"]}
    panels = ALL_DASHBOARDS[name]["panels"]
    asked = [part["datasource"] for panel in panels for part in (panel, *panel["targets"])]
    assert asked
    assert all(source == {"type": variables["datasource"]["query"], "uid": "${datasource}"} for source in asked)


@pytest.mark.parametrize("name", ["service", "model"])
def test_every_panel_about_the_service_shows_the_chosen_one_alone(name: str) -> None:
    queries = [t["expr"] for p in DASHBOARDS[name]["panels"] if p["title"] != "Edge" for t in p["targets"]]
    assert queries
    for query in queries:
        assert metrics(query) == set(re.findall(r'([\w:]+)\{job="\$job"', query)), query
    (job,) = [v for v in DASHBOARDS[name]["templating"]["list"] if v["name"] == "job"]
    assert job["datasource"]["uid"] == "${datasource}"


def test_panels_neither_overlap_nor_leave_the_grid() -> None:
    for board in ALL_DASHBOARDS.values():
        cells: list[Any] = []
        for p in (panel["gridPos"] for panel in json.loads(text(board))["panels"]):
            cells += [(x, y) for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
        assert len(cells) == len(set(cells))
        assert max(x for x, _ in cells) < 24
