"""The workloads: which images are sent, and how each server wants them packed."""

from __future__ import annotations

import base64
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

IMAGES = sorted((Path(__file__).parents[1] / "images").glob("*.jpg"))
SAMPLE = IMAGES[len(IMAGES) // 2]
VERDICT = SAMPLE.stem
"""The single small image, and the class that a server must answer for it before it is measured."""
BATCH = 64
BOUNDARY = "-" * 10 + "benchmark"


class Body(NamedTuple):
    content_type: str
    content: bytes


Pack = Callable[[list[bytes]], Body]
"""Turns the images of one request into its body."""


def multipart(field: str) -> Pack:
    def pack(images: list[bytes]) -> Body:
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="{{}}.jpg"\r\n'
        parts = [
            head.format(i).encode() + b"Content-Type: image/jpeg\r\n\r\n" + image + b"\r\n"
            for i, image in enumerate(images)
        ]
        return Body(f"multipart/form-data; boundary={BOUNDARY}", b"".join(parts) + f"--{BOUNDARY}--\r\n".encode())

    return pack


def v2(images: list[bytes]) -> Body:
    """The Open Inference Protocol (V2), which MLServer speaks: binary data as base64 in JSON."""
    data = [base64.b64encode(image).decode() for image in images]
    tensor = {"name": "image", "shape": [len(data), 1], "datatype": "BYTES", "data": data}
    return Body(
        "application/json", json.dumps({"inputs": [tensor | {"parameters": {"content_type": "base64"}}]}).encode()
    )


class Workload(NamedTuple):
    """Each element of ``requests`` holds the images of one request; requests are sent in turn."""

    name: str
    requests: list[list[bytes]]

    @property
    def images_per_request(self) -> int:
        return len(self.requests[0])


def small() -> Workload:
    return Workload("small", [[SAMPLE.read_bytes()]])


def batch() -> Workload:
    images = [path.read_bytes() for path in IMAGES]
    return Workload("batch", [[images[i % len(images)] for i in range(BATCH)]])


def photographs(archive: Path) -> Workload:
    """Every JPEG of a tar archive, one per request."""
    with tarfile.open(archive) as tar:
        members = sorted((m for m in tar if m.name.lower().endswith((".jpg", ".jpeg"))), key=lambda member: member.name)
        files = [tar.extractfile(member) for member in members]
        return Workload("photographs", [[file.read()] for file in files if file])
