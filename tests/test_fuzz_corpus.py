"""Replays what fuzzing found: each input of the corpus gets a documented answer, and no decoder dies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serving import pacing
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


def test_giving_other_tasks_their_turn_does_not_end_the_fuzzing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any input may seem to take long where the machine has other work to do."""
    monkeypatch.setattr(pacing, "MAX_BLOCKING_SECONDS", 0.0)
    targets.parser(b'application/json\n{"images": ["", ""]}')
