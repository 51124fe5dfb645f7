"""`make new` in a copy of this checkout: afterwards the copy is entirely the new classifier's. `make check-new`"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import requests

from tests import toy
from tests.live import encode, free_port, picture, running
from train import readme

NAME = "shapes"
CONCERNED = (
    "api", "audit", "benchmark", "client", "docs", "drift", "explain", "faults", "gate", "golden", "imports", "options",
    "page", "report", "review", "sandbox", "service", "settings", "several_models", "soak", "store",
)  # fmt: skip
"""Tests that query the shipped model, send its pictures, or read what the documentation says about it."""
BEFORE = tuple(artifact.config.name for artifact in readme.shipped())
MANUAL = ("docs/tutorial.md", "docs/upgrade.md", "docs/versions.md", "tests/snippets.py")
"""These keep describing the example model and its pictures."""
RECORDS = (
    "CHANGELOG.md",
    "docs/benchmarks.*",
    "docs/without-vnni",
    "docs/decisions",
    "docs/operations/capacity.md",
    "monitoring/prometheus/rules/model.yml",
)
"""These record what was measured with the example model."""
MINUTES = 60.0


def run(copy: Path, *command: str, minutes: float = 10) -> str:
    done = subprocess.run(
        command, cwd=copy, env=environment(copy), capture_output=True, text=True, timeout=minutes * MINUTES
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return done.stdout + done.stderr


def environment(copy: Path) -> dict[str, str]:
    kept = {
        name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS", "OMP_WAIT_POLICY") if name in os.environ
    }
    return {**kept, "BENTOML_HOME": str(copy / ".bentoml"), "BENTOML_DO_NOT_TRACK": "True"}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with all files that would be committed here, after `make new` on synthetic 48x48 pictures."""
    root = tmp_path_factory.mktemp("new") / "checkout"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=toy.ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (toy.ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(toy.ROOT / name, root / name)
    (root / ".venv").symlink_to((toy.ROOT / ".venv").resolve())
    for requirements in root.glob("requirements*.txt"):
        os.utime(requirements, (0, 0))  # already installed
    for command in ("init --quiet", "add .", "-c user.name=test -c user.email=test@localhost commit --quiet -m copy"):
        run(root, "git", *command.split())
    folder = toy.make_folder(root.parent / "photos", per_class=120, zoom=2)
    options = ("EPOCHS=8", "TRAIN_FLAGS=--batch-size 32 --widths 16,32")
    run(root, "make", "new", f"NAME={NAME}", f"DATA={folder}", *options)
    return root


def test_nothing_names_the_previous_model(copy: Path) -> None:
    found = subprocess.run(
        ["git", "grep", "-lE", "|".join(BEFORE), "--", ".", *(f":!{path}" for path in (*MANUAL, *RECORDS))],
        cwd=copy,
        capture_output=True,
        text=True,
    )
    assert found.stdout == ""


def test_readme_and_docs_describe_the_new_model(copy: Path) -> None:
    readme = (copy / "README.md").read_text()
    assert "A convolutional network tells 3 classes apart on 48x48 pixels (disc, frame, stripes)." in readme
    assert f"\n| `{NAME}` | 0.1 M |" in readme
    assert re.search(r"-F image=@tests/images/(\w+)\.jpg .*\n.*\"class_name\":\"\1\"", readme)[1] in toy.CLASSES
    card = (copy / "docs/model-card.md").read_text()
    assert f"## {NAME}" in card
    linked = set(re.findall(r"\]\(images/(.+?)\)", card))
    assert linked
    pictures = {path.name for path in (copy / "docs/images").iterdir()}
    assert {name for name in pictures if name.startswith(NAME)} == linked
    assert not [name for name in pictures if name.startswith((*BEFORE, "frontier"))]


def test_make_uses_the_new_model_by_default(copy: Path) -> None:
    shown = run(copy, "make", "--dry-run", "train")
    assert f'train.fit "{copy.parent / "photos"}" --name {NAME} --out runs/{NAME}' in shown


def test_the_new_models_tests_pass(copy: Path) -> None:
    tests = [f"tests/test_{name}.py" for name in CONCERNED]
    run(copy, ".venv/bin/python", "-m", "pytest", "-n", "2", "--dist", "worksteal", *tests, minutes=60)


def test_the_new_model_is_built_and_served(copy: Path) -> None:
    run(copy, "make", "build")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [".venv/bin/bentoml", "serve", "classifier:latest", "--port", str(port), "--host", "127.0.0.1"]

    def is_ready() -> bool:
        return requests.get(f"{url}/readyz", timeout=5).ok

    with running(command, {**environment(copy), "WORKERS": "1"}, copy.parent / "server.log", is_ready, cwd=copy):
        reply = requests.post(f"{url}/classify", files={"image": encode(picture())}, timeout=60).json()
    assert reply["model"].startswith(f"{NAME}:")
    assert reply["class_name"] in toy.CLASSES
