"""Compare the command line with the service's own batch rate, in alternation, on a folder of images of one size.

python -m tests.benchmark.command_line FOLDER --rounds 3

The service has as many workers as `make serve` gives it, on the same machine: the client takes cores from the server.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from client.images import batches, find
from tests import live
from tests.benchmark.loads import Target, closed
from tests.benchmark.workloads import BATCH, Workload, multipart

BAR = 0.8
"""Minimum share of the service's own rate."""
CONNECTIONS, SECONDS = 8, 8
"""For wrk: with fewer connections, one of two workers may get most of them."""


def command_rate(folder: str, images: int, url: str, out: Path) -> float:
    """Images per second of the whole command, from its start to its exit."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "client", folder, "--url", url, "--out", out], check=True)
    return images / (time.perf_counter() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    images = find([options.folder])
    requests = [[path.read_bytes() for path in batch.values()] for batch in batches(images, BATCH)]
    whole = [request for request in requests if len(request) == BATCH]
    rates: dict[str, list[float]] = {"service": [], "command": []}
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        with live.serve("embedded", home, WORKERS=os.cpu_count()) as url:
            target = Target(f"{url}/classify/batch", Workload("folder", whole), multipart("images"), home)
            for number in range(options.rounds):
                rates["service"].append(closed(target, CONNECTIONS, SECONDS)["rate"] * BATCH)
                rates["command"].append(command_rate(options.folder, len(images), url, home / f"{number}.csv"))
                print(", ".join(f"{name} {rate[-1]:.0f} images/s" for name, rate in rates.items()), flush=True)
    share = median(rates["command"]) / median(rates["service"])
    print(f"{len(images)} images, medians of {options.rounds}: the command runs at {share:.0%} of the service's rate")
    return 0 if share >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
