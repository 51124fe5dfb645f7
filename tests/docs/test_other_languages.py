"""The JavaScript and Go examples, run against a real server: make check-docs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.snippets import DOCS, OTHERS, Reader, can_be_followed, read

PAGE = DOCS / "reference/clients.md"


@pytest.mark.skipif(not can_be_followed(PAGE), reason="the page tells of pictures that are not shipped here")
@pytest.mark.parametrize("language", OTHERS)
def test_an_example_prints_what_its_page_says(language: str, tmp_path: Path) -> None:
    snippets = [snippet for snippet in read(PAGE) if snippet.language == language]
    assert snippets
    with Reader(tmp_path) as reader:
        for snippet in snippets:
            reader.follow(snippet)
