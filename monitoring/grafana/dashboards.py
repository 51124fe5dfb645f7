"""The Grafana dashboards as plain data. Run it to write dashboards/*.json, which Grafana reads.

    python -m monitoring.grafana.dashboards

A panel is a title, a unit, and queries with their legends. It uses the alerts' time windows, so that it shows what an
alert has seen. The data source and the service are variables: another Grafana's source has another uid, and another
Prometheus may scrape several services.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
WIDTH, HEIGHT = 24, 8
"""Width of Grafana's grid, and default height of a panel, in grid cells."""
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

Json = dict[str, Any]

JOB = 'job="$job"'
"""Each service has a Prometheus job; a dashboard shows one at a time."""
CLASSIFY = f'{JOB}, endpoint=~"/classify(/batch)?"'
ANSWERED = f'{JOB}, endpoint="/classify", http_response_code="200"'
DURATION = "bentoml_service_request_duration_seconds"
SHOWN_CLASSES = 20
"""Most classes with a line of their own in a panel."""


def panel(title: str, unit: str, *queries: tuple[str, str], about: str = "", **options: Any) -> Json:
    """A time series, unless ``kind`` says otherwise; ``queries`` are pairs of legend and PromQL."""
    kind, width = options.pop("kind", "timeseries"), options.pop("width", 8)
    instant = kind in ("stat", "table", "bargauge")
    return {
        "type": kind,
        "title": title,
        "description": about,
        "datasource": SOURCE,
        "gridPos": {"w": width, "h": options.pop("height", HEIGHT)},
        "fieldConfig": {"defaults": {"unit": unit, **options}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": SOURCE,
                "expr": expr,
                "legendFormat": legend,
                "instant": instant,
                "range": not instant,
                "format": "table" if kind == "table" else "time_series",
            }
            for i, (legend, expr) in enumerate(queries)
        ],
    }


def variable(name: str, **options: Any) -> Json:
    return {"name": name, "label": name.replace("_", " "), **options}


def data_source(kind: str) -> Json:
    """The variable that ``datasource`` of every panel names: one of Grafana's sources of this kind."""
    return variable("datasource", type="datasource", query=kind)


def stat(title: str, unit: str, expr: str, red_below: float | None = None, red_above: float | None = None) -> Json:
    """A single number, green or red."""
    below, above = ("red", "green") if red_below is not None else ("green", "red")
    steps: list[Json] = [{"color": below, "value": None}]
    limit = red_below if red_below is not None else red_above
    if limit is not None:
        steps.append({"color": above, "value": limit})
    return panel(
        title, unit, ("", expr), kind="stat", width=4, height=4, thresholds={"mode": "absolute", "steps": steps}
    )


def most(expr: str) -> str:
    """A filter for the ``SHOWN_CLASSES`` with the largest ``expr``, which must not vary over the time range.

    By ``topk`` of the panel's own query each point in time would choose its own, and together show many more.
    """
    return f"on (class_name) topk({SHOWN_CLASSES}, {expr})"


def over_the_range(function: str, name: str) -> str:
    """``function`` of the metric ``name`` over the dashboard's time range, the same at each point in it."""
    return f"{function}({name}{{{JOB}}}[$__range] @ end())"


def stacked() -> Json:
    return {"custom": {"stacking": {"mode": "normal"}, "fillOpacity": 40}}


def quantiles(histogram: str, window: str = "5m", by: str = "le") -> list[tuple[str, str]]:
    return [
        (f"p{q * 100:g}", f"histogram_quantile({q}, sum by ({by}) (rate({histogram}[{window}])))")
        for q in (0.5, 0.95, 0.99)
    ]


MOST_FREQUENT = most(over_the_range("sum_over_time", "classifier:images:rate1h"))
MOST_CHANGED = most(
    f"abs({over_the_range('avg_over_time', 'classifier:class_share:ratio1h')}"
    f" - {over_the_range('avg_over_time', 'classifier:class_share:baseline')})"
)

SERVICE = [
    stat("Replicas up", "short", f"classifier:instances_up:count{{{JOB}}}", red_below=1),
    stat("Requests", "reqps", f"sum(rate(bentoml_service_request_total{{{CLASSIFY}}}[5m]))"),
    stat("Images", "short", f"sum(rate(classifier_images_total{{{JOB}}}[5m]))"),
    stat("p99 of /classify", "s", quantiles(f"{DURATION}_bucket{{{ANSWERED}}}")[2][1], red_above=0.1),
    stat(
        "Availability budget left",
        "percentunit",
        f'1 - classifier:slo_burn:30d{{{JOB}, slo="availability"}}',
        red_below=0,
    ),
    stat("Latency budget left", "percentunit", f'1 - classifier:slo_burn:30d{{{JOB}, slo="latency"}}', red_below=0),
    panel(
        "Requests by status",
        "reqps",
        (
            "{{http_response_code}}",
            f"sum by (http_response_code) (rate(bentoml_service_request_total{{{CLASSIFY}}}[5m]))",
        ),
        **stacked(),
    ),
    panel(
        "Not served",
        "percentunit",
        (
            "failed, overloaded",
            f'classifier:slo_bad:rate5m{{{JOB}, slo="availability"}} / (classifier:slo_requests:rate5m{{{JOB}}} > 0)',
        ),
        (
            "over 100 ms",
            f'classifier:slo_bad:rate5m{{{JOB}, slo="latency"}} / (classifier:slo_requests:rate5m{{{JOB}}} > 0)',
        ),
        about="Shares of the requests that count for each objective. A deadline of the caller's own is no failure.",
        min=0,
    ),
    panel("Latency of /classify", "s", *quantiles(f"{DURATION}_bucket{{{ANSWERED}}}"), min=0),
    panel(
        "Burn rate",
        "short",
        ("{{slo}} 5m", f"classifier:slo_burn:5m{{{JOB}}}"),
        ("{{slo}} 1h", f"classifier:slo_burn:1h{{{JOB}}}"),
        ("{{slo}} 6h", f"classifier:slo_burn:6h{{{JOB}}}"),
        about="1 uses up the budget in 30 days; 14.4 for an hour pages.",
        min=0,
    ),
    panel(
        "Turned away, by reason",
        "reqps",
        ("{{reason}}", f"sum by (reason) (rate(classifier_rejected_total{{{JOB}}}[5m]))"),
        about="Of 504, deadline_exceeded is the service's own deadline, caller_deadline a shorter one of the caller's.",
        **stacked(),
    ),
    panel(
        "Waiting and under way",
        "short",
        ("images in queue, {{instance}}", f"classifier_queue_images{{{JOB}}}"),
        (
            "requests, {{instance}}",
            f"sum by (instance) (bentoml_service_request_in_progress{{{CLASSIFY}}})",
        ),
        min=0,
    ),
    panel(
        "Images in a batch",
        "short",
        (
            "mean",
            f"sum(rate(classifier_batch_images_sum{{{JOB}}}[5m]))"
            f" / (sum(rate(classifier_batch_images_count{{{JOB}}}[5m])) > 0)",
        ),
        *quantiles(f"classifier_batch_images_bucket{{{JOB}}}"),
        min=0,
    ),
    panel(
        "Mean time of a stage",
        "s",
        (
            "{{stage}}",
            f"sum by (stage) (rate(classifier_stage_seconds_sum{{{JOB}}}[5m]))"
            f" / (sum by (stage) (rate(classifier_stage_seconds_count{{{JOB}}}[5m])) > 0)",
        ),
        about="classify is queue and engine of one request, infer the engine's time for one batch.",
        min=0,
    ),
    panel(
        "Engines busy",
        "percentunit",
        ("{{instance}}", f"classifier:engine_busy:ratio_rate5m{{{JOB}}}"),
        about="Seconds of inference for each second and worker, embedded alone. Small images saturate at 0.6 to 0.8.",
        min=0,
        max=1,
    ),
    panel("Inference p99", "s", ("{{instance}}", f"classifier:infer_seconds:p99_5m{{{JOB}}}"), min=0),
    panel(
        "Workers",
        "short",
        ("{{instance}}", f"classifier:workers:count{{{JOB}}}"),
        min=0,
        about="Whose event loop turned within a minute.",
    ),
    panel(
        "Edge",
        "short",
        ("requests a second", "rate(nginx_http_requests_total[5m])"),
        ("active connections", "nginx_connections_active"),
        ("certificate, days left", "(probe_ssl_earliest_cert_expiry - time()) / 86400"),
        about="This stack's Nginx, whichever service is chosen.",
        min=0,
    ),
]

MODEL = [
    stat(
        "Mean confidence",
        "percentunit",
        f"sum(rate(classifier_confidence_sum{{{JOB}}}[1h])) / sum(rate(classifier_confidence_count{{{JOB}}}[1h]))",
    ),
    stat("Foreign images", "percentunit", f"classifier:foreign_images:ratio1h{{{JOB}}}", red_above=0.2),
    stat("Class mix drift (PSI)", "short", f"classifier:class_mix_drift:psi{{{JOB}}}", red_above=0.25),
    stat("Confidence drift (KS)", "short", f"classifier:confidence_drift:ks{{{JOB}}}", red_above=0.15),
    stat("Images in the last hour", "short", f"classifier:images:increase1h{{{JOB}}}"),
    stat("Models not on every replica", "short", f"classifier:models_not_everywhere:count{{{JOB}}}", red_above=1),
    panel(
        "Verdicts by class",
        "short",
        ("{{class_name}}", f"sum by (class_name) (rate(classifier_images_total{{{JOB}}}[5m])) and {MOST_FREQUENT}"),
        about=f"Of more than {SHOWN_CLASSES} classes, the most frequent over the time range shown.",
        width=12,
        **stacked(),
    ),
    panel(
        "Share of each class, last hour minus baseline",
        "percentunit",
        (
            "{{class_name}}",
            f"(classifier:class_share:ratio1h{{{JOB}}} - classifier:class_share:baseline{{{JOB}}}) and {MOST_CHANGED}",
        ),
        about=f"Of more than {SHOWN_CLASSES} classes, those that differ most over the time range shown.",
        width=12,
    ),
    panel(
        "Confidence",
        "percentunit",
        *(
            (
                f"{q:.0%} of the verdicts below",
                f"histogram_quantile({q}, sum by (le) (rate(classifier_confidence_bucket{{{JOB}}}[5m])))",
            )
            for q in (0.05, 0.25, 0.5)
        ),
        min=0,
        max=1,
    ),
    panel(
        "Drift",
        "short",
        ("class mix (PSI)", f"classifier:class_mix_drift:psi{{{JOB}}}"),
        ("confidence (KS)", f"classifier:confidence_drift:ks{{{JOB}}}"),
        about="Alerts above 0.25 and 0.15, given 1,000 images an hour.",
        min=0,
    ),
    panel("Foreign images", "percentunit", ("share", f"classifier:foreign_images:ratio1h{{{JOB}}}"), min=0),
    panel(
        "Input drift, by feature",
        "short",
        ("{{feature}} (PSI)", f"classifier:input_drift:psi{{{JOB}}}"),
        about="The last hour against the data of the artifact; 0.25 is the usual mark of a major shift.",
        min=0,
    ),
    panel("Models served", "short", ("", f"classifier_model_info{{{JOB}}}"), kind="table", width=WIDTH, height=4),
]

# No network panels: in Compose, node-exporter would show its own container's network.
MACHINE = [
    panel("CPU busy", "percentunit", ("{{instance}}", "machine:cpu_busy:ratio_rate5m"), min=0, max=1),
    panel(
        "CPU load for each core",
        "short",
        ("{{instance}}", 'node_load5 / on (instance) count by (instance) (node_cpu_seconds_total{mode="idle"})'),
        about="Above 1 work waits for a core.",
        min=0,
    ),
    panel("Memory used", "percentunit", ("{{instance}}", "machine:memory_used:ratio"), min=0, max=1),
    panel("Disk used", "percentunit", ("{{device}}", "machine:disk_used:ratio"), min=0, max=1),
    panel("Disk busy", "percentunit", ("{{device}}", "rate(node_disk_io_time_seconds_total[5m])"), min=0),
    panel("Killed for memory", "short", ("processes", "increase(node_vmstat_oom_kill[1h])"), min=0),
    panel("GPU busy", "percent", ("GPU {{gpu}}", "DCGM_FI_DEV_GPU_UTIL"), min=0, max=100),
    panel("GPU memory used", "percentunit", ("GPU {{gpu}}", "gpu:memory_used:ratio"), min=0, max=1),
    panel("GPU temperature", "celsius", ("GPU {{gpu}}", "DCGM_FI_DEV_GPU_TEMP")),
    panel("GPU power", "watt", ("GPU {{gpu}}", "DCGM_FI_DEV_POWER_USAGE"), min=0),
    panel("GPU last Xid", "short", ("GPU {{gpu}}", "DCGM_FI_DEV_XID_ERRORS"), about="0 is none.", min=0),
]


def dashboard(uid: str, title: str, panels: list[Json], *variables: Json) -> Json:
    """A dashboard with its panels placed in rows, left to right, as they fit."""
    x = y = row = 0
    placed = []
    for number, item in enumerate(panels, 1):
        width, height = item["gridPos"]["w"], item["gridPos"]["h"]
        if x + width > WIDTH:
            x, y, row = 0, y + row, 0
        placed.append({"id": number, **item, "gridPos": {"x": x, "y": y, "w": width, "h": height}})
        x, row = x + width, max(row, height)
    return {
        "uid": uid,
        "title": title,
        "tags": ["classifier"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": list(variables)},
        "panels": placed,
    }


PROMETHEUS = data_source("prometheus")
CHOSEN_JOB = variable(
    "job",
    type="query",
    datasource=SOURCE,
    query='label_values(up{job=~"classifier.*"}, job)',
    refresh=2,  # whenever the time range changes: a service that is gone is listed while its data is shown
    sort=1,
)
DASHBOARDS = {
    "service": dashboard("classifier-service", "Classifier: service", SERVICE, PROMETHEUS, CHOSEN_JOB),
    "model": dashboard("classifier-model", "Classifier: model", MODEL, PROMETHEUS, CHOSEN_JOB),
    "machine": dashboard("classifier-machine", "Classifier: machine and GPU", MACHINE, PROMETHEUS),
}


def text(board: Json) -> str:
    return json.dumps(board, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, board in DASHBOARDS.items():
        (FOLDER / f"{name}.json").write_text(text(board), encoding="utf-8")
