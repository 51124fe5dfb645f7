"""Replicas of the bundle behind Nginx, run as one server that stops on SIGTERM.

python -m tests.benchmark.replicas PORT REPLICAS
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests import live, nginx


def main() -> None:
    port, count = map(int, sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # no blocked signal: the replicas would inherit it
    home = Path(os.environ["BENTOML_HOME"])
    ports = [live.free_port() for _ in range(count)]
    with ExitStack() as running:
        for number in ports:
            replica = home / str(number)
            environment = {**os.environ, "BENTOML_HOME": str(replica)}
            ready = partial(live.is_ready, f"http://127.0.0.1:{number}")
            running.enter_context(live.running(live.command(number), environment, replica / live.LOG, ready))
        running.enter_context(nginx.before(ports, port, home))
        signal.pause()


if __name__ == "__main__":
    main()
