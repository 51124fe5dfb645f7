"""Fixtures shared by several test files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.artifact import Artifact
from tests import toy
from tests.live import LIMITS, Server, await_workers, serve
from train import data

# The tests expect FP32 on one device. `make check-gpu` skips this file.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# All servers are on this machine, whatever proxy leads out of it.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make_folder(tmp_path_factory.mktemp("toy") / "folder")


@pytest.fixture(scope="session")
def loaded(toy_folder: Path) -> data.Data:
    """The images of ``toy_folder``, as training reads them."""
    return data.load(str(toy_folder))


@pytest.fixture(scope="session")
def toy_run(toy_folder: Path) -> Path:
    """A finished training run on ``toy_folder``."""
    run = toy_folder.parent / "run"
    toy.run("train.fit", toy_folder, "--name", "toy", "--out", run, *toy.RECIPE)
    return run


@pytest.fixture(scope="session")
def toy_artifact(toy_folder: Path, toy_run: Path) -> Artifact:
    """The artifact exported from ``toy_run``, in every format."""
    path = toy_folder.parent / "artifact"
    toy.run("train.export", toy_run, toy_folder, "--out", path)
    return Artifact.load(path)


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("embedded")
    with serve("embedded", home, **LIMITS) as url:
        await_workers(home)
        yield Server(url, "embedded", home)


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("runner")
    with serve("runner", home, **LIMITS) as url:
        await_workers(home)
        yield Server(url, "runner", home)


@pytest.fixture(params=["embedded", "runner"])
def server(request: pytest.FixtureRequest) -> Server:
    """Each topology in turn, for tests that must pass on both."""
    chosen: Server = request.getfixturevalue(request.param)
    return chosen
