"""The raw numbers of a run, merged over its rounds: medians of rates and times, sums of counts."""

from __future__ import annotations

import re
from itertools import chain
from statistics import median
from typing import Any

OURS = BUNDLE, STACK = "bundle", "stack"
EMBEDDED, RUNNER, ONE_WORKER = "bundle, embedded", "bundle, runner", "bundle, embedded, 1 worker"
ONE_REPLICA, TWO_REPLICAS = "bundle, 1 replica behind Nginx", "bundle, 2 replicas behind Nginx"
DEPENDS = "BentoML, documented depends"
SUMMED = ("replies", "errors")
MIDDLE = 64
"""Connections at which the bars, the tables and the plots compare the servers."""
Run = dict[str, Any]


def without_folders(text: str) -> str:
    """``text`` with every path of this machine reduced to its last name, because the results are published."""
    return re.sub(r"(?<![\w:./])/(?:[^\s'\"/]+/)+", "", text)


class Results:
    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        records = [record for record in raw["records"] if record["closed"]]
        self.names = list(dict.fromkeys(record["name"] for record in records))
        self.kinds = {record["name"]: record["kind"] for record in records}
        self._records = records
        self.problems = {r["name"]: without_folders(r["problem"]) for r in raw["records"] if "problem" in r}
        self.versions = {record["name"]: record["versions"] for record in records}
        self.connections = sorted(
            {run["connections"] for r in records for run in r["closed"] if run["workload"] == "small"}
        )
        self.factors = sorted({run["factor"] for record in records for run in record["open"]})
        self.deadline = float(raw["options"]["deadline"])

    @property
    def others(self) -> list[str]:
        return [name for name in self.names if self.kinds[name] not in OURS]

    def closed(self, name: str, workload: str, connections: int | None = None) -> Run | None:
        """The closed loop of server ``name``; without ``connections``, the only one for that workload."""
        return _merge(
            [
                run
                for record in self._of(name)
                for run in record["closed"]
                if run["workload"] == workload and connections in (None, run["connections"])
            ]
        )

    def open(self, name: str, factor: float) -> Run | None:
        return _merge([run for record in self._of(name) for run in record["open"] if run["factor"] == factor])

    def value(self, name: str, key: str) -> float | None:
        found = [record[key] for record in self._of(name) if key in record]
        return median(found) if found else None

    def best_rate(self, name: str) -> float:
        return max(run["rate"] for c in self.connections if (run := self.closed(name, "small", c)))

    def errors(self, name: str, connections: int | None = None) -> tuple[int, int]:
        """Errors and replies over all closed loops, or over those with ``connections`` connections."""
        runs = [
            run for record in self._of(name) for run in record["closed"] if connections in (None, run["connections"])
        ]
        return sum(run["errors"] for run in runs), sum(run["replies"] for run in runs)

    def ceiling(self, workload: str) -> float:
        return float(max(self.raw["ceiling"][workload].values()))

    def _of(self, name: str) -> list[dict[str, Any]]:
        return [record for record in self._records if record["name"] == name]


def _merge(runs: list[Run]) -> Run | None:
    return {key: _merged(key, [run[key] for run in runs]) for key in runs[0]} if runs else None


def _merged(key: str, values: list[Any]) -> Any:
    if isinstance(values[0], dict):
        return {name: sum(value.get(name, 0) for value in values) for name in dict.fromkeys(chain(*values))}
    if key in SUMMED:
        return sum(values)
    numbers = [value for value in values if isinstance(value, int | float)]
    return median(numbers) if numbers else values[0]
