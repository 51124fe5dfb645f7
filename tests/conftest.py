"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.artifact import Artifact
from tests import toy


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make_folder(tmp_path_factory.mktemp("toy") / "folder")


@pytest.fixture(scope="session")
def toy_run(toy_folder: Path) -> Path:
    """A finished training run on ``toy_folder``."""
    run = toy_folder.parent / "run"
    toy.run("train.fit", toy_folder, "--name", "toy", "--out", run, *toy.RECIPE)
    return run


@pytest.fixture(scope="session")
def toy_artifact(toy_folder: Path, toy_run: Path) -> Artifact:
    """The artifact of ``toy_run``, in every format."""
    path = toy_folder.parent / "artifact"
    toy.run("train.export", toy_run, toy_folder, "--out", path)
    return Artifact.load(path)
