"""Draw the dashboards from Prometheus' current data, for pages that cannot show Grafana itself.

python -m monitoring.grafana.render http://localhost:9090 docs/images --minutes 60
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import requests

mpl.use("Agg")
from matplotlib import pyplot as plt  # only after choosing a backend that needs no display
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

from monitoring.grafana.dashboards import DASHBOARDS, WIDTH

Series = list[dict[str, Any]]
POINTS = 60
JOB = "classifier"
"""The service that is drawn, in place of the dashboards' variable."""
COLUMN, ROW, HEADER, MARGIN = 0.55, 0.28, 0.35, 0.5
"""Sizes within a picture, in inches."""
SCALES = {
    "percentunit": (100, " %"),
    "percent": (1, " %"),
    "s": (1000, " ms"),
    "celsius": (1, " °C"),
    "watt": (1, " W"),
}
"""Factor and suffix of the units that are not drawn as a bare number."""


def query(prometheus: str, expr: str, instant: bool, minutes: float) -> Series:
    """The series of a panel's query, without NaN: their last values if ``instant``, else those of the last ``minutes``.

    Raises ``ValueError`` with Prometheus' message if the query fails.
    """
    now = time.time()
    window = {"time": now} if instant else {"start": now - 60 * minutes, "end": now, "step": 60 * minutes / POINTS}
    reply = requests.post(
        f"{prometheus}/api/v1/query{'' if instant else '_range'}", data={"query": expr, **window}, timeout=60
    )
    body = reply.json()
    if body["status"] != "success":
        raise ValueError(f"{expr}: {body['error']}")
    series = []
    for each in body["data"]["result"]:
        points = [(t, float(v)) for t, v in each.get("values") or [each["value"]] if v != "NaN"]
        if points:
            series.append({"labels": each["metric"], "points": points})
    return series


def answers(prometheus: str, panel: dict[str, Any], minutes: float) -> list[tuple[str, dict[str, str], Any]]:
    """Legend, labels and points of each series of a panel."""
    found = []
    for target in panel["targets"]:
        expr = target["expr"].replace("$job", JOB).replace("$__range", f"{60 * minutes:.0f}s")
        for series in query(prometheus, expr, target["instant"], minutes):
            legend = target["legendFormat"]
            for label, value in series["labels"].items():
                legend = legend.replace("{{" + label + "}}", value)
            found.append((legend, series["labels"], series["points"]))
    return found


def draw_panel(axes: Axes, panel: dict[str, Any], found: list[tuple[str, dict[str, str], Any]]) -> None:
    axes.set_title(panel["title"], fontsize=8, loc="left")
    defaults = panel["fieldConfig"]["defaults"]
    factor, unit = SCALES.get(defaults["unit"], (1, ""))
    if panel["type"] != "timeseries" or not found:
        axes.axis("off")
    if not found:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes, color="grey", fontsize=8)
    elif panel["type"] == "stat":
        value = f"{found[0][2][-1][1] * factor:.3g}{unit}"
        axes.text(0.5, 0.4, value, ha="center", va="center", fontsize=18, transform=axes.transAxes)
    elif panel["type"] == "table":
        rows = [", ".join(f"{k}={v}" for k, v in labels.items() if k != "__name__") for _, labels, _ in found]
        axes.text(0, 0.9, "\n".join(rows), va="top", fontsize=7, transform=axes.transAxes)
    else:
        end = max(points[-1][0] for *_, points in found)
        for legend, _, points in found:
            axes.plot([(t - end) / 60 for t, _ in points], [v * factor for _, v in points], lw=1, label=legend)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))
        axes.tick_params(labelsize=6)
        axes.grid(alpha=0.3)
        highest = max(v for *_, points in found for _, v in points) * factor
        if "min" in defaults:
            axes.set_ylim(bottom=defaults["min"], top=1.3 * highest or 1)  # leaves room for the legend
        axes.legend(fontsize=5, loc="upper left", ncols=2)


def draw(prometheus: str, board: dict[str, Any], path: Path, minutes: float) -> None:
    """Draw a dashboard to ``path``, its panels where Grafana places them; time is in minutes before now."""
    height = ROW * max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in board["panels"]) + HEADER
    figure = plt.figure(figsize=(COLUMN * WIDTH, height))
    for panel in board["panels"]:
        p = panel["gridPos"]
        box = Bbox.from_bounds(
            (COLUMN * p["x"] + MARGIN) / (COLUMN * WIDTH),
            1 - (HEADER + ROW * (p["y"] + p["h"]) - MARGIN / 2) / height,
            (COLUMN * p["w"] - 1.3 * MARGIN) / (COLUMN * WIDTH),
            (ROW * p["h"] - MARGIN) / height,
        )
        draw_panel(figure.add_axes(box.bounds), panel, answers(prometheus, panel, minutes))
    figure.suptitle(board["title"], x=0.01, y=1 - 0.1 / height, ha="left", va="top", fontsize=11)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prometheus", help="base URL")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, board in DASHBOARDS.items():
        path = arguments.folder / f"dashboard-{name}.png"
        draw(arguments.prometheus, board, path, arguments.minutes)
        print(path)


if __name__ == "__main__":
    main()
