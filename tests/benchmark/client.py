"""Measure the latency of a deployed service from here, with a few threads of one connection each.

Needs only Python's standard library.

python -m tests.benchmark.client http://localhost:3000 photo.jpg -n 200 -c 8
"""

from __future__ import annotations

import argparse
import http.client
import mimetypes
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple
from urllib.parse import urlsplit


class Reply(NamedTuple):
    outcome: str
    seconds: float


def send(url: str, image: bytes, content_type: str, count: int) -> list[Reply]:
    """Send ``count`` requests one after another over one connection, and reconnect after a failure."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=30)
    replies = []
    for _ in range(count):
        started = time.perf_counter()
        try:
            connection.request("POST", f"{parts.path.rstrip('/')}/classify", image, {"Content-Type": content_type})
            response = connection.getresponse()
            response.read()
            outcome = str(response.status)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            outcome = type(error).__name__
        replies.append(Reply(outcome, time.perf_counter() - started))
    return replies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="base URL of the service")
    parser.add_argument("image", type=Path)
    parser.add_argument("-n", type=int, default=200, help="requests")
    parser.add_argument("-c", type=int, default=8, help="connections")
    options = parser.parse_args()
    image, content_type = options.image.read_bytes(), mimetypes.guess_type(options.image.name)[0] or "image/jpeg"
    counts = [options.n // options.c + (i < options.n % options.c) for i in range(options.c)]
    started = time.perf_counter()
    with ThreadPoolExecutor(options.c) as pool:
        parts = pool.map(lambda count: send(options.url, image, content_type, count), counts)
        replies = [reply for part in parts for reply in part]
    elapsed = time.perf_counter() - started
    outcomes = Counter(reply.outcome for reply in replies)
    print(f"{len(replies)} requests in {elapsed:.2f} s: {len(replies) / elapsed:.1f} a second")
    print("replies:", ", ".join(f"{outcome}: {count}" for outcome, count in sorted(outcomes.items())))
    milliseconds = [1000 * reply.seconds for reply in replies if reply.outcome == "200"]
    if len(milliseconds) > 1:
        cuts = quantiles(milliseconds, n=100, method="inclusive")
        print(f"ms: p50 {cuts[49]:.1f}, p95 {cuts[94]:.1f}, p99 {cuts[98]:.1f}, max {max(milliseconds):.1f}")
    return 0 if set(outcomes) == {"200"} else 1


if __name__ == "__main__":
    sys.exit(main())
