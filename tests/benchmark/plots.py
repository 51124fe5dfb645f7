"""The curves of ``docs/benchmarks.md``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.benchmark.results import EMBEDDED, MIDDLE, OURS, RUNNER, Results


def draw(results: Results, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for plot in (throughput, latency, overload, batches, memory):
        figure = Figure(figsize=(9.5, 4.5), layout="constrained")
        axes: Axes = figure.subplots()
        plot(results, axes)
        axes.grid(alpha=0.3)
        figure.savefig(directory / f"bench-{plot.__name__}.png", dpi=110)


def style(results: Results, name: str) -> dict[str, Any]:
    """A fixed colour for each server across all plots; the bundle's lines are thicker."""
    ours = results.kinds[name] in OURS
    colour = mpl.colormaps["tab20"](results.names.index(name))
    return {"color": colour, "linewidth": 3 if ours else 1.2, "marker": "o" if ours else "."}


def throughput(results: Results, axes: Axes) -> None:
    for name in results.names:
        runs = [run for c in results.connections if (run := results.closed(name, "small", c))]
        axes.plot([r["connections"] for r in runs], [r["rate"] for r in runs], label=name, **style(results, name))
    axes.set(xscale="log", xlabel="connections", ylabel="requests/s", title="One small JPEG per request, closed loop")
    axes.set_xticks(results.connections, [str(c) for c in results.connections])
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def latency(results: Results, axes: Axes) -> None:
    middle = MIDDLE if MIDDLE in results.connections else results.connections[-1]
    runs = {name: run for name in results.names if (run := results.closed(name, "small", middle))}
    for offset, percentile in enumerate(("p50", "p95", "p99")):
        places = [place + 0.27 * (1 - offset) for place in range(len(runs))]
        axes.barh(places, [1000 * run[percentile] for run in runs.values()], 0.25, label=percentile)
    axes.set_yticks(range(len(runs)), list(runs))
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="ms", title=f"Latency of one small JPEG at {middle} connections")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def overload(results: Results, axes: Axes) -> None:
    for name in results.names:
        runs = [run for factor in results.factors if (run := results.open(name, factor))]
        axes.plot([r["offered"] for r in runs], [r["good"] for r in runs], label=name, **style(results, name))
    axes.set(xlabel="offered load, requests/s", ylabel=f"answered 200 within {results.deadline:g} s, requests/s")
    axes.set_title("Overload: open loop up to five times each server's own saturation")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def batches(results: Results, axes: Axes) -> None:
    """Share of batches by size; the histogram's buckets are cumulative."""
    names = [name for name in (EMBEDDED, RUNNER) if name in results.names]
    series = [(name, c) for name in names for c in results.connections]
    for position, (name, connections) in enumerate(series):
        counts = (results.closed(name, "small", connections) or {})["batch_images"]
        labels = sorted(counts, key=float)
        total, left, before = max(counts.values(), default=0) or 1, 0.0, 0.0
        for index, label in enumerate(labels):
            share = (counts[label] - before) / total
            colour = mpl.colormaps["viridis"](index / len(labels))
            axes.barh(position, share, left=left, color=colour, label=f"≤ {float(label):g}" if position == 0 else None)
            left, before = left + share, counts[label]
    axes.set_yticks(range(len(series)), [f"{name}, {c} connection{'s' if c > 1 else ''}" for name, c in series])
    axes.invert_yaxis()
    axes.set(xlabel="share of batches", title="Images per batch, one small JPEG per request")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def memory(results: Results, axes: Axes) -> None:
    sizes = {name: size for name in results.names if (size := results.value(name, "pss_mib"))}
    axes.barh(list(sizes), list(sizes.values()), color=[style(results, name)["color"] for name in sizes])
    axes.invert_yaxis()
    axes.set(xlabel="MiB", title="Memory of all processes after the loads (PSS)")
