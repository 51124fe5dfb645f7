from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
import requests

from tests.e2e.docker import IMAGE, ROOT, has_image
from tests.e2e.stack import Stack, running, session


@pytest.fixture(scope="session")
def image() -> str:
    """The CPU image; built if it is missing."""
    if not has_image(IMAGE):
        subprocess.run(("make", "image-cpu", f"IMAGE_CPU={IMAGE}"), cwd=ROOT, check=True)
    return IMAGE


@pytest.fixture(scope="session")
def stack(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(image, tmp_path_factory.mktemp("stack")) as stack:
        yield stack


@pytest.fixture(scope="session")
def client(stack: Stack) -> requests.Session:
    return session()
