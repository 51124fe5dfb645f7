"""A full disk that holds metrics, logs and audit lines at once."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import requests

from tests import live
from tests.faults.load import seconds_until
from tests.faults.server import API, classify, starts, workers
from tests.golden import SHIPPED_NAME

REQUESTS = 100
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="by design: a disk of 4 MB is mounted, which needs root")


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> Path:
    file = folder / "fill"
    with file.open("wb", buffering=0) as output, suppress(OSError):
        while True:
            output.write(bytes(4096))
    return file


@needs_root
def test_a_full_disk_fails_no_request(tmp_path: Path, say: Callable[[str], None]) -> None:
    with small_disk(tmp_path / "prometheus_multiproc_dir") as disk:
        folders = {"LOG_DIRECTORY": disk, "AUDIT_DIRECTORY": disk}
        with live.serve("embedded", tmp_path, WORKERS=2, **folders) as url:
            seconds_until(lambda: starts(tmp_path, API) == 2, 60)
            filler = fill(disk)
            before = workers(tmp_path, API)
            for number in range(REQUESTS):
                assert classify(url).status_code == 200
                bad = requests.post(f"{url}/classify", b"no image", headers={"Content-Type": "image/png"}, timeout=30)
                assert bad.status_code == 415
                assert requests.get(f"{url}/unknown{number}", timeout=30).status_code == 404
            values = live.samples(url)
            assert workers(tmp_path, API) == before
            assert live.total(values, "classifier_rejected_total", reason="not_found") == REQUESTS
            # A worker that dies meanwhile can only be replaced once there is room again.
            os.kill(before[0], signal.SIGKILL)
            for _ in range(REQUESTS):
                assert classify(url).status_code == 200
            filler.unlink()
            restored = seconds_until(lambda: starts(tmp_path, API) == 3, 60)
            assert classify(url).status_code == 200
    say(f"full disk: {4 * REQUESTS} sent, 0 lost; a dead worker is back {restored:.1f} s after there is room")


@needs_root
def test_starting_without_disk_space_for_the_model_says_so(tmp_path: Path) -> None:
    with small_disk(tmp_path / "home") as home:
        done = subprocess.run(
            live.command(live.free_port()),
            cwd=live.REPOSITORY,
            env=live.environment(home),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: MODEL={SHIPPED_NAME!r}: ")
    assert "No space left on device" in line
