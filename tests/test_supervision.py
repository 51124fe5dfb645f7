"""The supervisor of the worker processes, apart from them; with them it is in test_faults.py and tests/faults."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.live import LOG, REPOSITORY, STOP_SECONDS, command, environment, family, free_port

LOOK_IN_MID_START = """
from circus.arbiter import Arbiter
from circus.util import synchronized
from serving.supervision import Supervisor

class Slow(Supervisor):
    def __init__(self):
        Arbiter.__init__(self, [], "tcp://127.0.0.1:0", "tcp://127.0.0.1:0")

    @synchronized("arbiter_start_watchers")
    def start(self):
        self.manage_watchers()

Slow().start()
"""


def test_a_look_at_the_workers_during_their_start_is_no_error() -> None:
    """In a process of its own, for BentoML warns of what it imports."""
    subprocess.run((sys.executable, "-c", LOOK_IN_MID_START), cwd=REPOSITORY, check=True, timeout=120)


def test_a_service_that_is_told_to_stop_in_mid_start_stops(tmp_path: Path) -> None:
    with (tmp_path / LOG).open("wb") as log:
        settings = environment(tmp_path, RUNTIME="onnx-int8", WORKERS=3)
        server = subprocess.Popen(command(free_port()), cwd=REPOSITORY, env=settings, stdout=log, stderr=log)
    while len(family(server.pid)) == 1 and server.poll() is None:
        time.sleep(0.001)
    server.send_signal(signal.SIGTERM)
    server.wait(STOP_SECONDS)
    assert "Traceback" not in (tmp_path / LOG).read_text()
