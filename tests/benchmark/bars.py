"""The targets that the bundle must meet, judged from the raw numbers."""

from __future__ import annotations

from collections.abc import Iterator

from tests.benchmark.results import DEPENDS, EMBEDDED, MIDDLE, ONE_WORKER, RUNNER, Results, Run

Verdict = tuple[str, str, str, str]
"""What is judged, measured value, target, whether it was met."""
FIVEFOLD = 5.0
REQUESTS = 50_000
ALLOWED = {"200", "429", "503"}


def judge(results: Results) -> Iterator[Verdict]:
    """One row for each target whose numbers the run contains."""
    for rows in (against_peers, single_latency, ceiling, runner, overload, start, scaling):
        yield from rows(results)


def verdict(what: str, measured: str, bar: str, met: bool) -> Verdict:
    return what, measured, bar, "yes" if met else "**no**"


def best_peer(results: Results, workload: str, connections: int, key: str = "rate") -> tuple[str, Run] | None:
    runs = [(name, run) for name in results.others if (run := results.closed(name, workload, connections))]
    if key == "p50":  # refusals are fast: compare latency only among runs without errors
        runs = [(name, run) for name, run in runs if not run["errors"]]
    best = min if key == "p50" else max
    return best(runs, key=lambda pair: pair[1][key]) if runs else None


def against_peers(results: Results) -> Iterator[Verdict]:
    for workload, factor in (("small", 1.5), ("photographs", 1.3)):
        ours, best = results.closed(EMBEDDED, workload, MIDDLE), best_peer(results, workload, MIDDLE)
        if not ours or not best:
            continue
        name, theirs = best
        ratio = ours["rate"] / theirs["rate"]
        title = f"{workload}, {MIDDLE} connections, requests/s against {name}"
        yield verdict(title, f"{ratio:.2f} x", f"≥ {factor} x", ratio >= factor)
        yield verdict(f"{workload}: errors", f"{ours['errors']}", "0", ours["errors"] == 0)
        if workload == "small":
            times = f"{1000 * ours['p99']:.1f} ms, {1000 * theirs['p99']:.1f} ms"
            yield verdict(f"{workload}: p99 against {name}", times, "no worse", ours["p99"] <= theirs["p99"])


def single_latency(results: Results) -> Iterator[Verdict]:
    ours, best = results.closed(EMBEDDED, "small", 1), best_peer(results, "small", 1, "p50")
    if ours and best:
        name, theirs = best
        times = f"{1000 * ours['p50']:.2f} ms, {1000 * theirs['p50']:.2f} ms"
        yield verdict(f"small, 1 connection: p50 against {name}", times, "no worse", ours["p50"] <= theirs["p50"])


def ceiling(results: Results) -> Iterator[Verdict]:
    for workload, connections, bar in (("small", MIDDLE, 0.7), ("batch", None, 0.9)):
        if run := results.closed(EMBEDDED, workload, connections):
            share = run["images_per_second"] / results.ceiling(workload)
            yield verdict(f"{workload}: share of the in-process ceiling", f"{share:.0%}", f"≥ {bar:.0%}", share >= bar)


def runner(results: Results) -> Iterator[Verdict]:
    ours, theirs = results.closed(RUNNER, "small", MIDDLE), results.closed(DEPENDS, "small", MIDDLE)
    if ours and theirs:
        ratio = ours["rate"] / theirs["rate"] if theirs["rate"] else float("inf")
        yield verdict("runner topology, against the documented `depends`", f"{ratio:.1f} x", "≥ 4 x", ratio >= 4)
    if ours:
        errors, replies = results.errors(RUNNER, MIDDLE)
        bar = f"0 of ≥ {REQUESTS:,}"
        met = errors == 0 and replies >= REQUESTS
        yield verdict(f"runner topology: errors, {MIDDLE} connections", f"{errors} of {replies:,}", bar, met)


def overload(results: Results) -> Iterator[Verdict]:
    # A single worker leaves a core to the generator, and shows how a server behaves under load from another machine.
    for name in (EMBEDDED, ONE_WORKER, RUNNER):
        if run := results.open(name, FIVEFOLD):
            curve = [r["good"] for factor in results.factors if (r := results.open(name, factor))]
            share = run["good"] / max(*curve, results.best_rate(name))
            yield verdict(f"{name}: goodput at 5 x saturation, of peak", f"{share:.0%}", "≥ 90%", share >= 0.9)
            outcomes = ", ".join(sorted(run["outcomes"]))
            yield verdict(f"{name}: replies at 5 x", outcomes, "200, 429, 503", set(run["outcomes"]) <= ALLOWED)
            met = run["p99"] is not None and run["p99"] <= results.deadline
            p99 = "none" if run["p99"] is None else f"{run['p99']:.2f} s"
            yield verdict(f"{name}: p99 of the 200s at 5 x", p99, f"≤ {results.deadline:g} s", met)


def start(results: Results) -> Iterator[Verdict]:
    seconds = results.value(EMBEDDED, "start_seconds")
    if seconds:
        yield verdict("process start to first correct answer", f"{seconds:.1f} s", "≤ 3 s", seconds <= 3)


def scaling(results: Results) -> Iterator[Verdict]:
    if EMBEDDED in results.names and ONE_WORKER in results.names:
        ratio = results.best_rate(EMBEDDED) / results.best_rate(ONE_WORKER)
        yield "all workers against one, best requests/s", f"{ratio:.2f} x", "", ""
