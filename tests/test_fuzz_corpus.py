"""What fuzzing has found, again: each input of the corpus is answered as documented, and no decoder dies of it."""

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
def test_what_fuzzing_found_is_answered(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = sorted((CORPUS / name).iterdir())
    assert len(inputs) > 20
    monkeypatch.chdir(tmp_path)
    for path in inputs:
        targets.TARGETS[name](path.read_bytes())
    assert not list(tmp_path.rglob("*"))  # nothing to be contained
