"""The canary: its parts refer to each other correctly, and its analysis judges good, bad and missing figures correctly.

promtool runs the analysis' own queries over synthetic series; its conditions are evaluated on the results.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml

from tests.kubernetes.rendered import ROOT, only, run

CANARY = only("production", "Rollout")["spec"]["strategy"]["canary"]
TEMPLATE = only("production", "AnalysisTemplate")
METRICS = {metric["name"]: metric for metric in TEMPLATE["spec"]["metrics"]}
ANALYSES = [step["analysis"] for step in CANARY["steps"] if "analysis" in step]
POD = 'namespace="classifier",rollouts_pod_template_hash="abc"'
MINUTES = 10


def series(name: str, labels: str, per_minute: int) -> dict[str, str]:
    return {"series": f"{name}{{{POD},{labels}}}", "values": f"0+{per_minute}x{MINUTES}"}


def replies(code: int, per_minute: int, within_objective: int = 0) -> list[dict[str, str]]:
    labels = f'endpoint="/classify",http_response_code="{code}"'
    duration = "bentoml_service_request_duration_seconds"
    return [
        series("bentoml_service_request_total", labels, per_minute),
        series(f"{duration}_count", labels, per_minute),
        series(f"{duration}_bucket", f'{labels},le="0.1"', within_objective),
    ]


def rejected(reason: str, per_minute: int) -> list[dict[str, str]]:
    return [series("classifier_rejected_total", f'reason="{reason}"', per_minute)]


STABLE_ONLY = [{"series": 'bentoml_service_request_total{namespace="classifier"}', "values": f"0+60x{MINUTES}"}]
CASES = {
    "good": (replies(200, 1000, 1000), {"availability": 0.0, "latency": 0.0}, "Successful"),
    "a few failures": (replies(200, 9990, 9990) + replies(503, 5), {"availability": 5 / 9995}, "Successful"),
    "failing": (replies(200, 900, 900) + replies(500, 100), {"availability": 0.1}, "Failed"),
    "full": (replies(200, 900, 900) + replies(429, 100) + rejected("overloaded", 100), {"availability": 0.1}, "Failed"),
    "a key's limit": (
        replies(200, 900, 900) + replies(429, 100) + rejected("rate_limited", 100),
        {"availability": 0.0},
        "Successful",
    ),
    "past our deadline": (
        replies(200, 931, 931) + replies(504, 69) + rejected("deadline_exceeded", 60) + rejected("caller_deadline", 9),
        {"availability": 0.06},
        "Failed",
    ),
    "past the caller's own deadline": (
        replies(200, 900, 900) + replies(504, 99) + rejected("deadline_exceeded", 0) + rejected("caller_deadline", 99),
        {"availability": 0.0},
        "Successful",
    ),
    "slow": (replies(200, 1000, 500), {"latency": 0.5}, "Failed"),
    "one failure of few": (replies(200, 190, 190) + replies(500, 1), {"availability": None}, "Inconclusive"),
    "one slow of few": (replies(200, 30, 25), {"latency": None}, "Inconclusive"),
    "a few slow": (replies(200, 1000, 995), {"latency": 0.005}, "Successful"),
    "idle": (replies(200, 0), {"availability": None, "latency": None}, "Inconclusive"),
    "not scraped yet": (STABLE_ONLY, {"availability": None, "latency": None}, "Inconclusive"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_analysis_gives_the_right_verdict(case: str, tmp_path: Path) -> None:
    given, expected, verdict = CASES[case]
    expectations = [expectation(name, value) for name, value in expected.items()]
    test = {"tests": [{"interval": "1m", "input_series": given, "promql_expr_test": expectations}]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    run("promtool", "test", "rules", tmp_path / "test.yml")
    for name, value in expected.items():
        assert judge(name, [] if value is None else [value]) == verdict, name


def expectation(name: str, value: float | None) -> dict[str, object]:
    """What promtool should find. It compares exactly, so the query has the tolerance; only NaN differs from itself."""
    query = "(" + METRICS[name]["provider"]["prometheus"]["query"].replace("{{args.canary}}", "abc") + ")"
    if value is None:
        return {"expr": query, "eval_time": f"{MINUTES}m", "exp_samples": []}
    same = f"count({query} != {query})" if math.isnan(value) else f"count(abs({query} - {value}) < 1e-9)"
    return {"expr": same, "eval_time": f"{MINUTES}m", "exp_samples": [{"labels": "{}", "value": 1}]}


def judge(name: str, result: list[float]) -> str:
    """The phase that Argo Rollouts would give a measurement."""
    if holds(METRICS[name]["failureCondition"], result):
        return "Failed"
    return "Successful" if holds(METRICS[name]["successCondition"], result) else "Inconclusive"


def holds(condition: str, result: list[float]) -> bool:
    python = re.sub(r"!(?!=)", " not ", condition.replace("&&", " and "))
    return bool(eval(python, {"len": len, "isNaN": math.isnan, "result": result}))


def test_the_canary_refers_to_its_services_route_and_analysis() -> None:
    (rule,) = only("production", "HTTPRoute")["spec"]["rules"]
    weights = {backend["name"]: backend["weight"] for backend in rule["backendRefs"]}
    assert weights == {CANARY["stableService"]: 100, CANARY["canaryService"]: 0}
    for analysis in ANALYSES:
        assert analysis["templates"] == [{"templateName": TEMPLATE["metadata"]["name"]}]
        assert {argument["name"] for argument in analysis["args"]} == {a["name"] for a in TEMPLATE["spec"]["args"]}


def test_every_step_that_shifts_traffic_is_analysed() -> None:
    assert [next(iter(step)) for step in CANARY["steps"]] == ["setWeight", "analysis"] * len(ANALYSES)


def test_a_canary_ends_before_two_versions_raise_an_alert() -> None:
    minutes = len(ANALYSES) * max(int(m["initialDelay"].removesuffix("m")) + m["count"] for m in METRICS.values())
    groups = yaml.safe_load((ROOT / "monitoring/prometheus/rules/service.yml").read_text())["groups"]
    alerts = {rule.get("alert"): rule for group in groups for rule in group["rules"]}
    assert {metric["interval"] for metric in METRICS.values()} == {"1m"}
    assert minutes < int(alerts["ClassifierVersionMismatch"]["for"].removesuffix("m"))
