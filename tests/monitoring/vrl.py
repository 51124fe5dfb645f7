"""monitoring/logging/lines.vrl, run by Vector's own VRL engine."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.live import REPOSITORY

ENGINE = "vrl-python==0.1.0"
PROGRAM = REPOSITORY / "monitoring/logging/lines.vrl"
APPLY = """
import json, sys
from vrl_python import VRLRuntime
program, events = json.load(sys.stdin)
print(json.dumps([VRLRuntime.run(program, event, "UTC").processed_event for event in events]))
"""

Event = dict[str, Any]


def events(lines: list[Event]) -> list[Event]:
    """What Vector makes of the events from its sources."""
    command = (
        "uv",
        "run",
        "--quiet",
        "--no-project",
        "--python",
        sys.executable,
        "--with",
        ENGINE,
        "python",
        "-c",
        APPLY,
    )
    given = json.dumps([PROGRAM.read_text(), lines])
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made: list[Event] = json.loads(done.stdout)
    return made


def from_docker(service: str, line: str) -> Event:
    """An event as the log driver `fluentd` sends it; the tag is set in compose.logs.yaml."""
    return {"log": line, "tag": service, "timestamp": "2026-01-31T12:00:00.5Z", "source": "stdout", "container_id": "x"}


def from_audit(line: str) -> Event:
    return {"message": line, "file": "/audit/audit-api-1.jsonl", "timestamp": "2026-01-31T12:00:00.5Z"}
