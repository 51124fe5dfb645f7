"""Turn measurements into ``docs/capacity.md``: how many workers a given rate of images needs, and what they cost.

python -m tests.benchmark.capacity docs/benchmarks.json --price 0.05 --out docs/capacity.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import NamedTuple

from tests.benchmark.queueing import highest_utilisation, response
from tests.benchmark.report import NONE, milliseconds, table
from tests.benchmark.results import EMBEDDED, ONE_WORKER, Results
from tests.benchmark.workloads import SAMPLE

OBJECTIVE = 0.1
"""Seconds within which 99 % of the requests must be answered: monitoring/prometheus/rules/slo.yml."""
WANTED = (100, 1_000, 10_000, 100_000, 1_000_000)
HEADERS = 300
"""Approximate bytes of a request other than its image."""
LINK = 10
"""Gbit/s of an ordinary network card."""


class Worker(NamedTuple):
    """One worker on one core, while the other workers are busy too."""

    rate: float
    """Maximum images per second."""
    elsewhere: float
    """Seconds of a request spent outside the worker: network, parsing, waiting for a thread."""
    utilisation: float
    """Highest at which the corrected model keeps the p99 within the objective; capped at the highest measured."""

    @classmethod
    def of(cls, results: Results, images_per_second: float) -> Worker:
        """One of the workers that together classify ``images_per_second``."""
        rate = images_per_second / results.raw["cores"]
        elsewhere = time_elsewhere(results, rate)
        limit = OBJECTIVE / shortfall(results) - elsewhere
        return cls(rate, elsewhere, min(highest_measured(results), highest_utilisation(limit * rate)))

    def replicas(self, images_per_second: float) -> int | None:
        """One of them is a spare, so the objective holds while one is away. None if even an idle worker is too slow."""
        return ceil(images_per_second / (self.utilisation * self.rate)) + 1 if self.utilisation else None


class Check(NamedTuple):
    """An open loop below saturation: the modelled and the measured p99, in seconds."""

    workers: int
    utilisation: float
    offered: float
    predicted: float
    measured: float | None
    """None if nothing was classified."""


def compared(results: Results) -> Iterator[Check]:
    for name, count in ((ONE_WORKER, 1), (EMBEDDED, results.raw["cores"])):
        rate = results.best_rate(name) / count
        for factor in (factor for factor in results.factors if factor < 1):
            if run := results.open(name, factor):
                predicted = time_elsewhere(results, rate) + response(factor) / rate
                yield Check(count, factor, run["offered"], predicted, run["p99"])


def time_elsewhere(results: Results, rate: float) -> float:
    alone = results.closed(ONE_WORKER, "small", 1)
    assert alone
    return max(0.0, alone["p50"] - 1 / rate)


def shortfall(results: Results) -> float:
    """The largest ratio of a measured p99 to the modelled one, and at least 1."""
    return max([1.0, *(check.measured / check.predicted for check in compared(results) if check.measured)])


def highest_measured(results: Results) -> float:
    """The highest utilisation, with all workers running, at which the objective was met; 0 if it never was."""
    every = (check for check in compared(results) if check.workers == results.raw["cores"])
    return max((check.utilisation for check in every if check.measured and check.measured <= OBJECTIVE), default=0.0)


def cost_per_million(cores: int, images_per_second: float, price: float) -> float:
    return cores * price / 3600 / images_per_second * 1e6


def page(results: Results, price: float) -> str:
    worker = Worker.of(results, results.best_rate(EMBEDDED))
    parts = (introduction(results, worker), replicas(worker, price), bottlenecks(results, worker), checks(results))
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def introduction(results: Results, worker: Worker) -> Iterator[str]:
    yield "# Capacity"
    yield ""
    yield "Written by `make capacity` from docs/benchmarks.json; nothing else was measured for it."
    yield f"Processor: {results.raw['processor']}. The model: a worker is one core that serves one image at a time,"
    yield "with its own queue and independent arrivals (M/D/1). Nginx picks the replica with the fewest requests, which"
    yield "shortens waits. Measured latencies are longer than the model's: its p99 is multiplied by the worst ratio in"
    yield "the last table, and no worker may be busier than the highest utilisation there that met the objective."
    yield ""
    yield from table(
        ["one worker", ""],
        [
            ["maximum images/s", f"{worker.rate:,.0f}"],
            ["time per request outside the worker, ms", milliseconds(worker.elsewhere)],
            ["measured p99 to the model's p99, worst ratio", f"{shortfall(results):.1f} x"],
            ["highest utilisation that met the objective", f"{highest_measured(results):.0%}"],
            [f"utilisation at which 99 % are within {1000 * OBJECTIVE:.0f} ms", f"{worker.utilisation:.1%}"],
            ["images/s at that utilisation", f"{worker.utilisation * worker.rate:,.0f}"],
        ],
    )


def replicas(worker: Worker, price: float) -> Iterator[str]:
    yield "## Replicas and cost"
    yield ""
    yield f"Each replica has one worker and one core; one replica is a spare. A core hour costs {price:g} (`PRICE=`)."
    yield ""
    rows = []
    for wanted in WANTED:
        count = worker.replicas(wanted)
        cost = f"{cost_per_million(count, wanted, price):.3g}" if count else NONE
        rows.append([f"{wanted:,}", whole(count), cost])
    yield from table(["images/s", "replicas", "cost per million images"], rows)


def whole(number: int | None) -> str:
    return NONE if number is None else f"{number:,}"


def bottlenecks(results: Results, worker: Worker) -> Iterator[str]:
    yield "## Where the bottleneck moves"
    yield ""
    size = SAMPLE.stat().st_size
    yield f"Images of {size:,} bytes plus {HEADERS} bytes of headers; network cards of {LINK} Gbit/s."
    yield ""
    photographs = results.closed(EMBEDDED, "photographs")
    large = Worker.of(results, photographs["images_per_second"]) if photographs else None
    head = ["images/s", "Gbit/s", "cards", "cores"] + (["cores, photographs"] if large else [])
    rows = []
    for wanted in WANTED:
        gigabits = wanted * (size + HEADERS) * 8 / 1e9
        row = [f"{wanted:,}", f"{gigabits:.3g}", f"{ceil(gigabits / LINK)}", whole(worker.replicas(wanted))]
        rows.append(row + ([whole(large.replicas(wanted))] if large else []))
    yield from table(head, rows)
    if large:
        yield f"Photographs allow a utilisation of {large.utilisation:.1%}, by the same rules and at their own rate;"
        yield "no open loop was measured with them. Of a core's time for one,"
        yield f"{1 - large.rate / worker.rate:.0%} is reading and decoding beyond what a small image needs."
        yield "A GPU takes over none of that."
    else:
        yield "Photographs, which take longer to decode, were not measured (`PHOTOS=`)."
    yield ""


def checks(results: Results) -> Iterator[str]:
    yield "## Checked against measurements"
    yield ""
    one, all_ = results.best_rate(ONE_WORKER), results.best_rate(EMBEDDED)
    yield f"The model assumes that every worker is as fast as the first. Measured, {results.raw['cores']} workers are"
    yield f"{all_ / one:.2f} times as fast as one, with the load generator on the same cores."
    yield ""
    rows = []
    for check in compared(results):
        times = [milliseconds(check.predicted), milliseconds(check.measured)]
        rows.append([str(check.workers), f"{check.utilisation:.0%}", f"{check.offered:,.0f}", *times])
    yield from table(["workers", "utilisation", "images/s", "p99 by the model, ms", "p99 measured, ms"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path)
    parser.add_argument("--price", type=float, required=True, help="of a core hour, in any currency")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.write_text(page(Results(json.loads(options.measured.read_text())), options.price))


if __name__ == "__main__":
    main()
