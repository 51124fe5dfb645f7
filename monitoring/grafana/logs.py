"""The Grafana dashboard of the log lines in Loki. Run it to write dashboards/logs.json. Needs the overlay `logs`.

python -m monitoring.grafana.logs
"""

from __future__ import annotations

from typing import Any

from monitoring.grafana.dashboards import FOLDER, WIDTH, Json, dashboard, data_source, panel, stacked, text, variable

SOURCE = {"type": "loki", "uid": "${datasource}"}
CHOSEN = '{service=~"$service", level=~"$level"}'


def logs(title: str, about: str, *queries: tuple[str, str], **options: Any) -> Json:
    """A panel whose queries are LogQL."""
    made = panel(title, options.pop("unit", "short"), *queries, about=about, width=options.pop("width", 12), **options)
    for each in (made, *made["targets"]):
        each["datasource"] = SOURCE
    return made


def choice(name: str, values: str) -> Json:
    """A variable that takes one of the comma-separated ``values``, or all of them."""
    return variable(name, type="custom", query=values, includeAll=True, allValue=".+", current={"value": "$__all"})


LOGS = [
    logs(
        "Lines",
        "By source: the service, Nginx, the audit log.",
        ("{{service}}", f"sum by (service) (count_over_time({CHOSEN} [$__auto]))"),
        **stacked(),
    ),
    logs(
        "Warnings and errors",
        "Of Nginx: 4xx and 5xx, and the lines of its error log.",
        (
            "{{service}} {{level}}",
            'sum by (service, level) (count_over_time({level=~"warning|error|critical"} [$__auto]))',
        ),
        **stacked(),
    ),
    logs(
        "p99 at Nginx",
        "As callers saw it, by path.",
        ("{{path}}", 'quantile_over_time(0.99, {service="nginx"} | seconds!="" | unwrap seconds [$__auto]) by (path)'),
        unit="s",
    ),
    logs(
        "Callers",
        "Requests of each API key.",
        ("{{key}}", 'sum by (key) (count_over_time({service="audit"} | key!="" [$__auto]))'),
        **stacked(),
    ),
    logs(
        "One request",
        "By its id, wherever it left a line.",
        ("", '{service=~".+"} | request_id="$request_id"'),
        kind="logs",
        width=WIDTH,
    ),
    logs("All lines", "That contain the text.", ("", f'{CHOSEN} |= "$contains"'), kind="logs", width=WIDTH, height=16),
]

DASHBOARD = dashboard(
    "classifier-logs",
    "Classifier: logs",
    LOGS,
    data_source("loki"),
    choice("service", "classifier,nginx,audit"),
    choice("level", "debug,info,warning,error,critical"),
    variable("request_id", type="textbox"),
    variable("contains", type="textbox"),
)

if __name__ == "__main__":
    (FOLDER / "logs.json").write_text(text(DASHBOARD), encoding="utf-8")
