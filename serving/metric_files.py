"""The memory-mapped files in which each process keeps its metrics, for prometheus_client to add up."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict

FILES = ("counter", "histogram", "gauge_all", "gauge_livesum", "gauge_livemax")
"""Each process has one per kind, ``<kind>_<pid>.db``; those of gauges are the modes that ``serving.metrics`` uses."""
RESERVED_BYTES = 2**17
"""Disk space reserved for each file; a worker that has used every series fills a tenth of it."""


def prepare() -> None:
    """Prepare the files of this process, if it is a worker; to be called before its first metric is made."""
    if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        _reserve(Path(folder))
        _tidy(Path(folder))
        # By default the library asks for the process id at each update, thirty per request. A worker does not fork.
        pid = os.getpid()
        values.ValueClass = values.MultiProcessValue(lambda: pid)  # type: ignore[no-untyped-call]


def _reserve(folder: Path) -> None:
    """The library grows the files as it writes to them, which on a full disk ends in SIGBUS instead of an error."""
    for kind in FILES:
        with (folder / f"{kind}_{os.getpid()}.db").open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, RESERVED_BYTES)


def _tidy(folder: Path) -> None:
    """Remove the gauges of dead processes, and their files of nothing but zeros.

    Gauges would keep their last values for ever, and a process that keeps failing to start would fill the disk.
    """
    for left in folder.glob("*_*.db"):
        is_dead = not Path("/proc", left.stem.rpartition("_")[2]).exists()
        if is_dead and (left.name.startswith("gauge_") or not _has_counted(left)):
            left.unlink(missing_ok=True)


def _has_counted(file: Path) -> bool:
    with suppress(FileNotFoundError):  # removed by another worker that is starting
        series = MmapedDict.read_all_values_from_file(file)  # type: ignore[no-untyped-call]
        return any(value for _, value, *_ in series)
    return False
