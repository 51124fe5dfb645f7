"""Is the stack that `make up` started at work? Asked from outside, as a caller would: make smoke."""

from __future__ import annotations

import json
import os
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVICE = f"https://localhost:{os.environ.get('HTTPS_PORT', '443')}"
PROMETHEUS = f"http://localhost:{os.environ.get('PROMETHEUS_PORT', '9090')}"
SECONDS = 20  # what the README advises callers


def tls() -> ssl.SSLContext:
    """Trusts the certificate that Nginx was given, whatever name it bears."""
    context = ssl.create_default_context(cafile=str(ROOT / "deploy/secrets/tls_certificate"))
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def classifies() -> str:
    image = (ROOT / "tests/images/dog.jpg").read_bytes()
    request = urllib.request.Request(f"{SERVICE}/classify", image, {"Content-Type": "image/jpeg"})
    with urllib.request.urlopen(request, timeout=SECONDS, context=tls()) as reply:
        answer = json.load(reply)
    return f"{answer['class_name']}, {answer['confidence']:.2f}, by {answer['model']}"


def hides_metrics() -> str:
    try:
        urllib.request.urlopen(f"{SERVICE}/metrics", timeout=SECONDS, context=tls())
    except urllib.error.HTTPError as error:
        assert error.code == 404, f"status {error.code}"
        return "404"
    raise AssertionError("/metrics can be read from outside")


def targets_are_up() -> str:
    with urllib.request.urlopen(f"{PROMETHEUS}/api/v1/targets?state=active", timeout=SECONDS) as reply:
        targets = json.load(reply)["data"]["activeTargets"]
    down = [f"{target['scrapePool']} {target['health']}" for target in targets if target["health"] != "up"]
    assert targets, "no targets"
    assert not down, f"not up: {', '.join(down)}"
    return f"{len(targets)} of {len(targets)}"


def main() -> int:
    checks: dict[str, Callable[[], str]] = {
        "classify over TLS": classifies,
        "metrics hidden": hides_metrics,
        "targets up": targets_are_up,
    }
    failed = 0
    for name, check in checks.items():
        try:
            print(f"ok    {name:18} {check()}")
        except (AssertionError, OSError) as error:
            failed += 1
            print(f"FAIL  {name:18} {error}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
