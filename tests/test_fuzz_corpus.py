"""Replays what fuzzing found: each input of the corpus gets a documented answer, and no decoder dies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import targets

CORPUS = Path(__file__).parent / "fuzz" / "corpus"


@pytest.fixture(autouse=True, scope="module")
def _end_of_the_sandbox() -> Iterator[None]:
    yield
    targets.sandbox().close()
    targets.sandbox.cache_clear()


@pytest.mark.parametrize("name", targets.TARGETS)
def test_inputs_found_by_fuzzing_get_documented_answers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = sorted((CORPUS / name).iterdir())
    assert len(inputs) > 20
    monkeypatch.chdir(tmp_path)
    for path in inputs:
        targets.TARGETS[name](path.read_bytes())
    assert not list(tmp_path.rglob("*"))  # no decoder died
