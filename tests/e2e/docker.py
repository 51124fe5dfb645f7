"""What the end-to-end tests share: Docker's command line and an image to classify."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).parents[2]
IMAGE = os.environ.get("IMAGE_CPU", "classifier:cpu")


def docker(*arguments: str, code: int | None = 0) -> str:
    """Run ``docker arguments`` and return its output. Checks the exit status unless ``code`` is None."""
    done = subprocess.run(("docker", *arguments), capture_output=True, text=True, timeout=120)
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return (done.stdout + done.stderr).strip()


def has_image(name: str) -> bool:
    return docker("image", "inspect", name, "--format", "{{.Id}}", code=None).startswith("sha256:")


def process_statuses(identity: str) -> list[dict[str, str]]:
    """/proc/PID/status of each process in a container."""
    pids = docker("top", identity, "-o", "pid").split()[1:]
    texts = []
    for pid in pids:
        with suppress(FileNotFoundError):  # a health check's process may have ended
            texts.append(Path(f"/proc/{pid}/status").read_text())
    return [dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line) for text in texts]


def jpeg() -> bytes:
    picture = np.full((48, 64, 3), 200, np.uint8)
    cv2.circle(picture, (32, 24), 15, (30, 90, 160), -1)
    return cv2.imencode(".jpg", picture)[1].tobytes()
