"""Imports go one way, and serving on a CPU never loads torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toy import ROOT

ALLOWED = {
    "client": {"client", "model", "serving", "settings"},
    "model": {"model"},
    "serving": {"serving", "model", "settings"},
    "settings.py": {"model"},
    "service.py": {"serving", "model", "settings"},
    "train": {"train", "model", "client"},
}
OURS = {"client", "model", "serving", "settings", "service", "train", "tests"}


def imports_of(path: Path) -> set[str]:
    """Top-level names of all modules imported anywhere in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("place", ALLOWED)
def test_imports_go_one_way(place: str) -> None:
    files = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))
    assert files
    for file in files:
        assert imports_of(file) & OURS <= ALLOWED[place], file


def test_only_the_store_and_the_service_import_bentoml() -> None:
    users = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "model").glob("*.py") if "bentoml" in imports_of(path)
    }
    assert users == {"model/store.py"}


def test_a_cpu_engine_is_loaded_without_torch() -> None:
    code = (
        "import sys; from model import artifact, batching, classifier, preprocess, runtimes, store, verification;"
        "a = artifact.Artifact.load(store.SHIPPED); "
        "verification.verify(runtimes.create('onnx-int8', a), a.reference('onnx-int8'));"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_the_command_line_does_not_import_what_only_the_service_needs() -> None:
    heavy = {"numpy", "cv2", "PIL", "onnxruntime", "pydantic"}
    code = f"import sys, client.__main__; assert not sys.modules.keys() & {heavy}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
