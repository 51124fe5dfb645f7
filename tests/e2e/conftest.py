from __future__ import annotations

import subprocess

import pytest

from tests.e2e.docker import IMAGE, ROOT, has_image


@pytest.fixture(scope="session")
def image() -> str:
    """The CPU image, built if missing."""
    if not has_image(IMAGE):
        subprocess.run(("make", "image-cpu", f"IMAGE_CPU={IMAGE}"), cwd=ROOT, check=True)
    return IMAGE
