"""The examples that need programs beside Python, run against a real server: make check-docs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from model.artifact import Artifact
from tests.golden import TYPICAL
from tests.live import Server
from tests.snippets import (
    DOCS,
    OTHERS,
    PAGES,
    PUBLISHED,
    REPOSITORY,
    can_be_followed,
    follow,
    needs_curl,
    read,
    to_follow,
)
from train import readme

CLIENTS = DOCS / "reference/clients.md"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if can_be_followed(page) and needs_curl(page)], ids=lambda page: page.stem
)
def test_examples_with_curl_run_and_print_what_the_page_says(page: Path, tmp_path: Path) -> None:
    follow(to_follow(page), tmp_path)


@pytest.mark.skipif(not can_be_followed(CLIENTS), reason="the page tells of pictures that are not shipped here")
@pytest.mark.parametrize("language", OTHERS)
def test_an_example_prints_what_its_page_says(language: str, tmp_path: Path) -> None:
    snippets = [snippet for snippet in read(CLIENTS) if snippet.language == language]
    assert snippets
    follow(snippets, tmp_path)


def answer_of(command: str, server: Server, folder: Path) -> dict[str, Any]:
    """What a command with curl prints, sent to ``server`` from ``folder``."""
    run = ["sh", "-c", command.replace(PUBLISHED, server.url).replace("curl", "curl --silent", 1)]
    done = subprocess.run(run, cwd=folder, capture_output=True, check=True, timeout=60)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_the_readmes_first_command_classifies_its_picture(embedded: Server) -> None:
    command = re.findall(r"^\$ (curl .+)$", readme.README.read_text(), re.M)[0]
    assert answer_of(command, embedded, REPOSITORY)["class_name"] == TYPICAL.stem


@pytest.mark.parametrize("name", ["dog", "a dog's", "50% dog", 'dog, "brown"; or \\black'])
def test_the_readmes_example_works_whatever_a_class_is_called(
    name: str, toy_artifact: Artifact, embedded: Server, tmp_path: Path
) -> None:
    pictures = tmp_path / readme.PICTURES
    pictures.mkdir(parents=True)
    for file in ("A.jpg", f"{name}.jpg", "~.jpg"):
        shutil.copy(TYPICAL, pictures / file)
    command, answer = readme.example(toy_artifact, tmp_path).removeprefix("$ ").split("\n")
    assert answer_of(command, embedded, tmp_path)["class_name"] == TYPICAL.stem
    told = json.loads(answer.replace(",…", ""))
    assert toy_artifact.config.classes[told["predicted_class"]] == told["class_name"]
