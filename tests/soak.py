"""An hour of ordinary load, to see what grows: `make soak`.

python -m tests.soak --seconds 3600

The service as shipped, at 70 % of the rate that wrk has just measured, with one broken image in 50. After each window
of load, once all connections are closed, it records resident memory and file descriptors of every process. Fails if,
after the warm-up, memory has grown by more than 5 % or descriptors at all; if a process was replaced; or if any answer
was neither 200 nor 4xx.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
import uvloop

from model.artifact import Artifact
from tests import live
from tests.benchmark import loads, machine, servers, workloads
from tests.benchmark.openloop import Load, arrivals, report
from tests.benchmark.workloads import Body

SHARE, GROWTH = 0.7, 0.05
WINDOW_SECONDS, DEADLINE = 10.0, 5.0
WARM_UP = 0.1
"""Share of the run. Of the rest, the first and the last fifth are compared."""
CONNECTIONS, CAPACITY_SECONDS = 64, 8
RESULTS, PLOT = live.REPOSITORY / "docs/soak.json", live.REPOSITORY / "docs/images/soak.png"


def bodies() -> list[Body]:
    """A hundred requests, two of them broken: one truncated, one no image."""
    images = [path.read_bytes() for path in workloads.IMAGES]
    good = [Body("image/jpeg", images[i % len(images)]) for i in range(98)]
    return [*good[:49], Body("image/jpeg", images[0][:-200]), *good[49:], Body("image/jpeg", b"no image")]


def capacity(running: servers.Running, home: Path) -> float:
    """Requests per second with one image each, in the benchmark's closed loop."""
    target = loads.Target(f"{running.url}/classify", workloads.small(), workloads.multipart("image"), home / "bodies")
    loads.closed(target, CONNECTIONS, 3)
    return float(loads.closed(target, CONNECTIONS, CAPACITY_SECONDS)["rate"])


def window(url: str, rate: float, sent: int, number: int) -> dict[str, Any]:
    """One window of load; continues through the bodies where the previous windows, of ``sent`` requests, ended.

    Each window has its own arrival times: the same ones repeated would not be a Poisson process.
    """
    turn = deque(bodies())
    turn.rotate(-sent)
    load, due = Load(f"{url}/classify", *turn), arrivals(rate, WINDOW_SECONDS, number)
    uvloop.run(load.run(due, DEADLINE))
    return report(load, due, WINDOW_SECONDS, DEADLINE)


def processes(pid: int) -> dict[str, dict[str, float]]:
    """Resident MiB and open descriptors of each process of a server, by process id."""
    return {
        str(member): {
            "mib": int(Path(f"/proc/{member}/statm").read_text().split()[1]) * 4096 / 2**20,
            "descriptors": len(list(Path(f"/proc/{member}/fd").iterdir())),
        }
        for member in live.family(pid)
    }


def measure(seconds: float) -> dict[str, Any]:
    bundle = next(server for server in servers.ALL if server.kind == servers.BUNDLE)
    with tempfile.TemporaryDirectory() as home, servers.start(bundle, Path(home)) as running:
        most = capacity(running, Path(home))
        time.sleep(2)  # until its connections are closed
        samples, started = [], time.monotonic()
        while (now := time.monotonic() - started) < seconds:
            sent = sum(sum(sample["outcomes"].values()) for sample in samples)
            loaded = window(running.url, SHARE * most, sent, len(samples))
            samples.append({"seconds": now, **loaded, "processes": processes(running.pid)})
            print(f"{now:6.0f} s: {_total(samples[-1], 'mib'):.1f} MiB, {samples[-1]['outcomes']}", flush=True)
    about = {
        "server": bundle.name,
        "model": Artifact.load(servers.SHIPPED).tag,
        "seconds": seconds,
        "capacity": most,
        "rate": SHARE * most,
    }
    return {**machine.describe(), **about, "samples": samples}


def _total(sample: dict[str, Any], what: str) -> float:
    return sum(process[what] for process in sample["processes"].values())


def growth(samples: list[dict[str, Any]], what: str) -> float:
    """Relative growth of the median from the first to the last fifth after the warm-up."""
    rest = samples[int(WARM_UP * len(samples)) :]
    fifth = max(1, len(rest) // 5)
    first, last = (median(_total(sample, what) for sample in part) for part in (rest[:fifth], rest[-fifth:]))
    return last / first - 1


def objections(samples: list[dict[str, Any]]) -> Iterator[str]:
    """Reasons to fail a server with these samples."""
    if (grown := growth(samples, "mib")) > GROWTH:
        yield f"memory has grown by {grown:.1%}"
    if (grown := growth(samples, "descriptors")) > 0:
        yield f"descriptors have grown by {grown:.1%}"
    if len({tuple(sample["processes"]) for sample in samples}) > 1:
        yield "a process was replaced"
    wrong = {outcome for sample in samples for outcome in sample["outcomes"] if outcome[0] != "4" and outcome != "200"}
    if wrong:
        yield f"some were answered {', '.join(sorted(wrong))}"


def draw(result: dict[str, Any], file: Path) -> None:
    mpl.use("agg")
    import matplotlib.pyplot as plt

    samples = result["samples"]
    minutes = [sample["seconds"] / 60 for sample in samples]
    figure, (memory, descriptors, latency) = plt.subplots(3, 1, sharex=True, figsize=(8, 7), layout="constrained")
    for number, pid in enumerate(samples[0]["processes"]):
        name = "supervisor" if number == 0 else f"worker {number}"
        for axes, what in ((memory, "mib"), (descriptors, "descriptors")):
            axes.plot(minutes, [sample["processes"].get(pid, {}).get(what) for sample in samples], label=name)
    for name in ("p50", "p95", "p99"):
        latency.plot(minutes, [1000 * sample[name] for sample in samples], label=name)
    for axes, label in ((memory, "resident MiB"), (descriptors, "descriptors"), (latency, "latency, ms")):
        axes.set(ylabel=label, ylim=(0, None))
        axes.legend(loc="lower right", ncols=3)
        axes.grid(alpha=0.3)
    latency.set(xlabel="minutes")
    figure.suptitle(f"{result['rate']:.0f} requests a second, 70 % of capacity; 2 % broken images")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600.0)
    options = parser.parse_args()
    result = measure(options.seconds)
    samples = result["samples"]
    result["growth"] = {what: growth(samples, what) for what in ("mib", "descriptors")}
    RESULTS.write_text(json.dumps(result) + "\n")
    draw(result, PLOT)
    sent = sum(sum(sample["outcomes"].values()) for sample in samples)
    print(f"{sent} requests in {options.seconds:.0f} s; growth {result['growth']}; see {RESULTS} and {PLOT}")
    sys.exit("; ".join(f"error: {objection}" for objection in objections(samples)) or 0)


if __name__ == "__main__":
    main()
