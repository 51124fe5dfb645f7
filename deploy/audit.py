"""Known vulnerabilities of every pinned package: `make audit`. `--options` prints pip-audit's options for the excuses.

Fails on a vulnerability that deploy/audit.toml does not excuse, or no longer does, and when the index gives no verdict:
no verdict is no acquittal.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EXCUSES = ROOT / "deploy/audit.toml"
REQUIREMENTS = ROOT / "requirements.txt"
"""Includes the packages of both images."""


class NoVerdictError(RuntimeError):
    """The index could not be read, for all packages or for some."""


def objections(report: Mapping[str, Any], excused: Mapping[str, date], today: date) -> Iterator[str]:
    """A line for each unexcused vulnerability in a pip-audit report; raises ``NoVerdictError``."""
    packages = report["dependencies"]
    if skipped := [package for package in packages if "skip_reason" in package]:
        raise NoVerdictError(f"{len(skipped)} of {len(packages)} packages: {skipped[0]['skip_reason']}")
    for package in packages:
        for found in package["vulns"]:
            names = {found["id"], *found["aliases"]}
            if not any(expires > today for name, expires in excused.items() if name in names):
                fixed = ", ".join(found["fix_versions"]) or "no version"
                yield f"{package['name']} {package['version']}: {'/'.join(sorted(names))}, fixed in {fixed}"


def excuses(file: Path) -> dict[str, date]:
    """The day on which the excuse of each vulnerability expires; every entry needs a reason."""
    entries = tomllib.loads(file.read_text()).get("excused", [])
    return {entry["id"]: entry["expires"] for entry in entries if entry["reason"]}


def ask(requirements: Path) -> dict[str, Any]:
    """pip-audit's report on exactly the pinned packages; raises ``NoVerdictError``."""
    options = ("--require-hashes", "--disable-pip", "--progress-spinner", "off", "--format", "json")
    command = (sys.executable, "-m", "pip_audit", "--requirement", requirements, *options)
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise NoVerdictError(done.stderr.strip().rpartition("\n")[2]) from None
    return report


def options(excused: Mapping[str, date], today: date) -> list[str]:
    """The pip-audit options that skip what is still excused."""
    return [part for name, expires in excused.items() if expires > today for part in ("--ignore-vuln", name)]


def main() -> None:
    if sys.argv[1:] == ["--options"]:
        print(*options(excuses(EXCUSES), date.today()))
        return
    try:
        found = list(objections(ask(REQUIREMENTS), excuses(EXCUSES), date.today()))
    except NoVerdictError as error:
        sys.exit(f"error: the index of vulnerabilities could not be read for {error}")
    print("\n".join(found) or "no known vulnerabilities")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
