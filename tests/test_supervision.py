"""The supervisor of the worker processes, apart from them; with them it is in test_faults.py and tests/faults."""

from __future__ import annotations

import subprocess
import sys

from tests.live import REPOSITORY

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
