"""Runs every command of the workflow `ci` on this machine, in its order: make ci-local."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

WORKFLOW = Path(__file__).parent / "workflows/ci.yml"


def main() -> None:
    for name, job in yaml.safe_load(WORKFLOW.read_text())["jobs"].items():
        for command in (step["run"] for step in job["steps"] if "run" in step):
            print(f"== {name}: {command}", flush=True)
            if subprocess.run(
                ("bash", "-euo", "pipefail", "-c", command.replace("$GITHUB_STEP_SUMMARY", ""))
            ).returncode:
                sys.exit(f"error: {command!r} of job {name!r} failed")


if __name__ == "__main__":
    main()
