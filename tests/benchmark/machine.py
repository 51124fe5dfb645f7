"""Describes the machine, and the software that a benchmark ran on."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from model.artifact import SHIPPED, Artifact
from tests.live import REPOSITORY
from train.evaluate import cpu_name

LIBRARIES = ("onnxruntime", "opencv-python-headless", "numpy", "uvicorn", "starlette")


def describe() -> dict[str, Any]:
    return {
        "model": Artifact.load(SHIPPED).tag,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "processor": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": int(_match(r"MemTotal:\s*(\d+)", "/proc/meminfo")) / 2**20,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "wrk": subprocess.run(["wrk", "-v"], capture_output=True, text=True).stdout.split(" Copyright")[0],
        "versions": versions(Path(sys.executable), LIBRARIES),
    }


def versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of ``packages`` as installed for the interpreter ``python``."""
    code = "import json, sys, importlib.metadata as m; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    reported: dict[str, str] = json.loads(subprocess.check_output([python, "-c", code, *packages]))
    return reported


def _git(*arguments: str) -> str:
    return subprocess.check_output(["git", *arguments], cwd=REPOSITORY, text=True).strip()


def _match(pattern: str, path: str) -> str:
    found = re.search(pattern, Path(path).read_text())
    return found[1] if found else "0"
