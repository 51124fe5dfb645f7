"""The queries that KEDA scales on, run by promtool over synthetic series: a query without a result is a failure."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.kubernetes.rendered import only, run

TRIGGERS = only("production", "ScaledObject")["spec"]["triggers"]
QUEUED, IN_FLIGHT = (trigger["metadata"]["query"] for trigger in TRIGGERS)
QUEUE = 'classifier_queue_images{namespace="classifier",pod="%s"}'
REQUESTS = 'bentoml_service_request_in_progress{namespace="classifier",pod="%s",endpoint="%s"}'


@pytest.mark.parametrize(
    ("series", "queued", "in_flight"),
    [
        ({}, None, None),
        ({QUEUE % "a": 0, QUEUE % "b": 0}, 0, 0),  # until the first request there are no other series
        (
            {
                QUEUE % "a": 40,
                QUEUE % "b": 8,
                REQUESTS % ("a", "/classify"): 20,
                REQUESTS % ("b", "/classify/batch"): 3,
                REQUESTS % ("b", "/explain"): 7,
            },
            48,
            23,
        ),
    ],
    ids=["nothing seen", "never asked", "busy"],
)
def test_scaling_queries_return_the_load_seen(
    series: dict[str, int], queued: int | None, in_flight: int | None, tmp_path: Path
) -> None:
    expectations = [
        {
            "expr": query,
            "eval_time": "5m",
            "exp_samples": [] if value is None else [{"labels": "{}", "value": value}],
        }
        for query, value in ((QUEUED, queued), (IN_FLIGHT, in_flight))
    ]
    given = [{"series": name, "values": f"{value}x9"} for name, value in series.items()]
    test = {"tests": [{"interval": "1m", "input_series": given, "promql_expr_test": expectations}]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    run("promtool", "test", "rules", tmp_path / "test.yml")
