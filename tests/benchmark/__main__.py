"""Measure the bundle and its peers on this machine, one after another, and write the raw numbers as JSON.

python -m tests.benchmark results.json --photos photos.tar
python -m tests.benchmark results.json --quick --only FastAPI bundle
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from tests import live
from tests.benchmark import ceiling, loads, machine, servers, workloads
from tests.benchmark.results import MIDDLE, RUNNER, without_folders
from tests.benchmark.servers import Running, Server
from tests.benchmark.workloads import Workload

CONNECTIONS = (1, 8, MIDDLE, 256)
BATCH_CONNECTIONS = 4
ENDURANCE_SECONDS = 90
"""For the runner topology, which must answer 50,000 requests without an error even on a slow machine."""
OVERLOADS = (0.5, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0)
"""Loads offered in the open loop, as multiples of the server's best rate in the closed loop."""
START_SECONDS = 15.0
"""Assumed cost of starting and stopping a server, for the estimate of the time left."""
QUICK_SECONDS = 2


class Progress:
    """Prints what has been measured and, from the pace so far, how long the rest will take."""

    def __init__(self, planned: float) -> None:
        self._planned, self._done, self._started = planned, 0.0, time.monotonic()

    def finished(self, server: Server, what: str, planned: float) -> None:
        self._done += planned
        left = max(0.0, self._planned - self._done) * (time.monotonic() - self._started) / self._done
        share = min(1, self._done / self._planned)
        print(f"[{share:4.0%}, {left / 60:4.1f} min left] {server.name}: {what}", flush=True)


class Loop(NamedTuple):
    """One closed-loop run."""

    workload: Workload
    connections: int
    seconds: int


def closed_plan(server: Server, sent: list[Workload], options: argparse.Namespace) -> list[Loop]:
    small, batch, *photographs = sent
    plan = [Loop(small, connections, options.seconds) for connections in CONNECTIONS]
    plan += [Loop(workload, MIDDLE, options.seconds) for workload in photographs]
    if server.takes_batches:
        plan.append(Loop(batch, BATCH_CONNECTIONS, options.seconds))
    if server.name == RUNNER and not options.quick:
        plan.append(Loop(Workload("endurance", small.requests), MIDDLE, ENDURANCE_SECONDS))
    return plan


def planned_seconds(server: Server, sent: list[Workload], options: argparse.Namespace) -> float:
    closed = sum(loop.seconds for loop in closed_plan(server, sent, options))
    return START_SECONDS + closed + len(OVERLOADS) * (options.seconds + options.deadline)


def measure(
    server: Server, sent: list[Workload], home: Path, options: argparse.Namespace, progress: Progress
) -> dict[str, Any]:
    """All measurements of one server. A failure is recorded under ``problem``, beside what was measured before it."""
    record: dict[str, Any] = {"name": server.name, "kind": server.kind, "closed": [], "open": []}
    try:
        started = time.monotonic()
        with servers.start(server, home) as running:
            record["start_seconds"] = time.monotonic() - started
            record["versions"] = machine.versions(server.python, server.packages)
            progress.finished(server, f"started in {record['start_seconds']:.1f} s", START_SECONDS)
            _closed_loops(running, sent, home, options, progress, record)
            _open_loops(running, sent[0], home, options, progress, record)
            record["pss_mib"] = servers.memory(running.pid)
    except Exception as error:
        record["problem"] = without_folders(str(error.__context__ or error))
        print(f"{server.name}: {record['problem']}", flush=True)
    return record


def _closed_loops(
    running: Running,
    sent: list[Workload],
    home: Path,
    options: argparse.Namespace,
    progress: Progress,
    record: dict[str, Any],
) -> None:
    for workload, connections, seconds in closed_plan(running.server, sent, options):
        target = _target(running, workload, home)
        loads.closed(target, connections, options.warm_up)
        before = _batch_sizes(running)
        run = loads.closed(target, connections, seconds)
        run |= {"workload": workload.name, "images_per_second": run["rate"] * workload.images_per_request}
        run["batch_images"] = {size: n - before[size] for size, n in _batch_sizes(running).items()}
        record["closed"].append(run)
        what = f"{workload.name}, {connections} connections: {run['rate']:.0f}/s, {run['errors']} errors"
        progress.finished(running.server, what, seconds)


def _open_loops(
    running: Running,
    small: Workload,
    home: Path,
    options: argparse.Namespace,
    progress: Progress,
    record: dict[str, Any],
) -> None:
    target = _target(running, small, home)
    best = max(run["rate"] for run in record["closed"] if run["workload"] == small.name)
    for factor in OVERLOADS:
        servers.settle(running, options.deadline)
        run = loads.opened(target, max(1.0, factor * best), options.seconds, options.deadline)
        record["open"].append({"factor": factor, **run})
        what = f"{run['offered']:.0f}/s offered: {run['good']:.0f}/s good, {run['outcomes']}"
        progress.finished(running.server, what, options.seconds + options.deadline)


def _target(running: Running, workload: Workload, home: Path) -> loads.Target:
    bodies = home / "bodies"
    if workload.images_per_request > 1:
        return loads.Target(f"{running.url}/classify/batch", workload, workloads.multipart("images"), bodies)
    return loads.Target(running.url + running.server.path, workload, running.server.pack, bodies)


def _batch_sizes(running: Running) -> dict[str, float]:
    """Cumulative count of batches by the histogram bucket of their size; empty for a peer."""
    if running.server.kind != servers.BUNDLE:
        return {}
    prefix = 'classifier_batch_images_bucket{le="'
    return {s.removeprefix(prefix)[:-2]: n for s, n in live.samples(running.url).items() if s.startswith(prefix)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--photos", type=Path, help="a tar archive of photographs, which are then measured too")
    parser.add_argument("--seconds", type=int, default=6, help="of each load")
    parser.add_argument("--warm-up", type=int, default=1, help="seconds before each load of the closed loop")
    parser.add_argument("--deadline", type=float, default=1.0, help="seconds within which a reply is good")
    parser.add_argument("--rounds", type=int, default=1, help="times that the whole is repeated; medians are reported")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SECONDS} s a load: see that it works")
    parser.add_argument("--only", nargs="+", default=[""], help="servers with one of these in their name")
    options = parser.parse_args()
    if options.quick:
        options.seconds = QUICK_SECONDS
    if shutil.which("wrk") is None:
        parser.error("wrk is missing: apt-get install wrk")
    if options.seconds <= options.deadline:
        parser.error(f"--seconds {options.seconds}; expected more than --deadline {options.deadline:g}")
    return options


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that no server is left behind
    chosen = [server for server in servers.ALL if any(part in server.name for part in options.only)]
    sent = [workloads.small(), workloads.batch()]
    sent += [workloads.photographs(options.photos)] if options.photos else []
    about = machine.describe() | {
        "options": {name: str(value) for name, value in vars(options).items() if name != "output"}
    }
    ceilings = ceiling.measure(sent, options.seconds / 2)
    progress = Progress(options.rounds * sum(planned_seconds(server, sent, options) for server in chosen))
    records = []
    for _ in range(options.rounds):
        for server in chosen:
            with tempfile.TemporaryDirectory() as home:
                records.append(measure(server, sent, Path(home), options, progress))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**about, "ceiling": ceilings, "records": records}, indent=1) + "\n")
    if any("problem" in record and record["kind"] == servers.BUNDLE for record in records):
        sys.exit("error: the bundle itself could not be measured")


if __name__ == "__main__":
    main()
