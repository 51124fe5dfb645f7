"""Write ``docs/benchmarks.md`` and its plots from the raw numbers; every figure there is computed here.

python -m tests.benchmark.report docs/benchmarks.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from model.tables import markdown
from tests.benchmark import bars, plots
from tests.benchmark.results import EMBEDDED, MIDDLE, ONE_REPLICA, ONE_WORKER, TWO_REPLICAS, Results, Run

NONE = "-"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [markdown(head, rows), ""]


def milliseconds(seconds: float | None) -> str:
    return NONE if seconds is None else f"{1000 * seconds:,.1f}"


def latencies(run: Run) -> str:
    """p50, p95 and p99, or the number of errors: wrk also times refusals, which are faster than answers."""
    if run["errors"]:
        return f"{run['errors']:,} errors"
    return " / ".join(milliseconds(run[p]) for p in ("p50", "p95", "p99"))


def conditions(results: Results) -> Iterator[str]:
    raw = results.raw
    libraries = ", ".join(f"{name} {version}" for name, version in raw["versions"].items())
    state = ", with uncommitted changes" if raw["modified"] else ""
    yield f"{raw['date']}, commit `{raw['commit'][:12]}`{state}; every server runs `{raw['model']}` in INT8."
    yield f"{raw['processor']}, {raw['cores']} cores, {raw['memory_gib']:.0f} GiB, Linux {raw['kernel']},"
    yield f"Python {raw['python']}; load average {raw['load_average']:.2f} at the start. {libraries}; {raw['wrk']}."
    options = ", ".join(f"`{name} {value}`" for name, value in raw["options"].items() if name not in ("only", "photos"))
    yield f"Options: {options}."
    yield ""


def closed(results: Results) -> Iterator[str]:
    head = [
        "",
        *(f"{c} connection{'s' if c > 1 else ''}, requests/s" for c in results.connections),
        "p50 / p95 / p99 at each, ms",
    ]
    rows = []
    for name in results.names:
        runs = [results.closed(name, "small", c) for c in results.connections]
        times = [latencies(run) for run in runs if run]
        rows.append([name, *(f"{run['rate']:,.0f}" if run else NONE for run in runs), "<br>".join(times)])
    yield from table(head, rows)


def larger(results: Results) -> Iterator[str]:
    workloads = ("photographs", "batch")
    head = ["", *(f"{w}, {unit}" for w in workloads for unit in ("images/s", "p50 / p95 / p99, ms"))]
    rows = []
    for name in results.names:
        row = [name]
        for workload in workloads:
            run = results.closed(name, workload)
            times = latencies(run) if run else NONE
            row += [f"{run['images_per_second']:,.0f}" if run else NONE, times]
        rows.append(row)
    yield from table(head, rows)
    yield "The bundle decodes a large JPEG at a fraction of its size, the peers in full: part of the difference with"
    yield "photographs comes from that, not from the framework."


def ceilings(results: Results) -> Iterator[str]:
    rates = results.raw["ceiling"]
    sizes = list(next(iter(rates.values())))
    rows = [[workload, *(f"{of[size]:,.0f}" for size in sizes)] for workload, of in rates.items()]
    yield from table(["images/s", *(f"batches of {size}" for size in sizes)], rows)


def overload(results: Results) -> Iterator[str]:
    head = ["good/s at", *(f"{factor:g} x" for factor in results.factors)]
    highest = results.factors[-1] if results.factors else 0
    head += [f"{what} at {highest:g} x" for what in ("replies", "p99 of the 200s, ms", "generator: core, delay p99 ms")]
    rows = []
    for name in results.names:
        runs = [results.open(name, factor) for factor in results.factors]
        row = [name, *(f"{run['good']:,.0f}" if run else NONE for run in runs)]
        if runs and (last := runs[-1]):
            outcomes = ", ".join(f"{outcome}: {count:,.0f}" for outcome, count in last["outcomes"].items())
            row += [outcomes, milliseconds(last["p99"])]
            row += [f"{last['generator_cpu']:.0%}, {milliseconds(last['lag_p99'])}"]
        rows.append(row + [NONE] * (len(head) - len(row)))
    yield from table(head, rows)


def resources(results: Results) -> Iterator[str]:
    rows = []
    for name in results.names:
        errors, replies = results.errors(name)
        size, start = results.value(name, "pss_mib"), results.value(name, "start_seconds")
        row = [f"{size:,.0f}" if size else NONE, f"{start:.1f}" if start else NONE, f"{errors:,} of {replies:,}"]
        versions = ", ".join(f"{package} {version}" for package, version in results.versions[name].items())
        rows.append([name, *row, versions])
    yield from table(["", "PSS, MiB", "start to first correct answer, s", "errors, closed loops", "versions"], rows)


def scaling(results: Results) -> Iterator[str]:
    """Workers of one server, and single-worker replicas behind Nginx."""
    rows = []
    for name in (ONE_WORKER, EMBEDDED, ONE_REPLICA, TWO_REPLICAS):
        if name in results.names:
            best, run = results.best_rate(name), results.closed(name, "small", MIDDLE)
            share = f"{best / results.best_rate(ONE_WORKER):.2f} x" if ONE_WORKER in results.names else NONE
            times = latencies(run) if run else NONE
            rows.append([name, f"{best:,.0f}", share, times])
    yield from table(["", "best requests/s", "of one worker's", f"p50 / p95 / p99 at {MIDDLE} connections, ms"], rows)
    cores = results.raw["cores"]
    yield f"All of them share {cores} cores with the load generator, the last two also with Nginx: cores are the limit."


def page(results: Results) -> str:
    judged = table(["what", "measured", "target", "met"], bars.judge(results))
    sections = {
        "Targets": judged,
        "One small JPEG per request": [
            *closed(results),
            "![](images/bench-throughput.png)",
            "![](images/bench-latency.png)",
        ],
        "Photographs, and 64 images per request": larger(results),
        "In process, without HTTP: the ceiling": ceilings(results),
        "Workers and replicas": scaling(results),
        "Overload": [*overload(results), "![](images/bench-overload.png)"],
        "Batch sizes": ["![](images/bench-batches.png)"],
        "Memory, start, errors": [*resources(results), "![](images/bench-memory.png)"],
    }
    if results.problems:
        problems = [f"- {name}: {(text.strip().splitlines() or [''])[-1]}" for name, text in results.problems.items()]
        sections["Not measured, or only in part"] = problems
    lines = ["# Benchmarks", "", "Written by `make bench`; no figure is typed by hand. Code: `tests/benchmark/`.", ""]
    lines += conditions(results)
    for title, content in sections.items():
        lines += [f"## {title}", "", *content, ""]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, help="what tests.benchmark wrote; the page goes beside it")
    path = parser.parse_args().raw
    results = Results(json.loads(path.read_text()))
    plots.draw(results, path.parent / "images")
    path.with_suffix(".md").write_text(page(results))
    print(path.with_suffix(".md"))


if __name__ == "__main__":
    main()
