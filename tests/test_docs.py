"""The documentation is true: its examples run, what they name exists, and its site builds without warnings."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import requests

from model.artifact import ONNX_INT8
from tests.golden import TYPICAL
from tests.live import Server
from tests.snippets import (
    DOCS,
    OTHERS,
    PAGES,
    PYTHON,
    REPOSITORY,
    Snippet,
    can_be_followed,
    follow,
    matches,
    named_in,
    needs_curl,
    read,
    tells_of_the_example,
    to_follow,
)
from tests.test_golden import MAX_DIFFERENCE

README = REPOSITORY / "README.md"
SNIPPETS = [snippet for page in (*PAGES, README) for snippet in read(page)]
EXECUTED = [page for page in PAGES if can_be_followed(page) and to_follow(page) and not needs_curl(page)]
TARGETS = set(re.findall(r"^([a-z0-9-]+):(?!=)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
LANGUAGES = {*PYTHON, *OTHERS, "json", "text", "yaml", "toml"}


def identity(value: object) -> str | None:
    if isinstance(value, Snippet):
        return f"{value.page.relative_to(REPOSITORY)}:{value.line}"
    return str(value.relative_to(REPOSITORY)) if isinstance(value, Path) else None


@pytest.mark.parametrize("page", EXECUTED, ids=identity)
def test_examples_run_and_print_what_the_page_says(page: Path, tmp_path: Path) -> None:
    follow(to_follow(page), tmp_path)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=identity)
def test_commands_name_existing_targets_and_modules(snippet: Snippet) -> None:
    assert snippet.language in LANGUAGES
    for kind, name in named_in(snippet):
        if kind == "target":
            assert name in TARGETS, f"make {name}"
        else:
            assert importlib.util.find_spec(name), f"python -m {name}"


def test_files_named_on_pages_exist() -> None:
    named = re.compile(r"`((?:deploy|docs|model|monitoring|serving|tests|train)/[\w./-]+)`")
    missing = [
        f"{page.relative_to(DOCS)}: {name}"
        for page in PAGES
        for name in named.findall(page.read_text())
        if not (REPOSITORY / name).exists() and not name.startswith("deploy/secrets")
        if can_be_followed(page) or not name.startswith("tests/images/")
    ]
    assert missing == []


def test_pages_about_the_example_model_are_listed_where_it_is_replaced() -> None:
    page = DOCS / "your-data.md"
    assert not tells_of_the_example(page)
    (section,) = re.findall(r"^## Make it the bundle's own model\n(.*?)^## ", page.read_text(), re.M | re.S)
    linked = {DOCS / link for link in re.findall(r"\]\((.+?\.md)\)", section)}
    assert linked >= {other for other in PAGES if tells_of_the_example(other)}


def test_the_readmes_first_example_gets_its_answer(embedded: Server) -> None:
    """On any processor: INT8 results may differ by one rounding step per layer."""
    (picture, answer), *_ = re.findall(r"^\$ curl -F image=@(\S+) .+\n(\{.+\})$", README.read_text(), re.M)
    assert picture == f"tests/images/{TYPICAL.name}"
    response = requests.post(
        f"{embedded.url}/classify", files={"image": (REPOSITORY / picture).read_bytes()}, timeout=60
    )
    found, told = response.json(), json.loads(answer.replace(",…", ""))
    assert list(found) == list(told)
    assert found["class_name"] == TYPICAL.stem
    for name in ("predicted_class", "class_name", "in_distribution"):
        assert found[name] == told[name]
    assert found["confidence"] == pytest.approx(told["confidence"], abs=MAX_DIFFERENCE[ONNX_INT8])
    first = found["all_probabilities"]["0"]
    assert first == pytest.approx(told["all_probabilities"]["0"], abs=MAX_DIFFERENCE[ONNX_INT8])


def test_links_in_the_readme_are_not_broken() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README.read_text())
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_only_the_ellipsis_matches_anything() -> None:
    assert matches('{"class_name":"dog",…}\n', '{"class_name":"dog","confidence":0.9}')
    assert not matches('{"class_name":"dog",…}', '{"class_name":"cat","confidence":0.9}')
    assert not matches("200", "2000")


class Resources(HTMLParser):
    """Collects what a browser fetches by itself to display a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.found.append(values.get("src") or "")
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect", "modulepreload"):
            self.found.append(values.get("href") or "")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder)
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        resources = Resources()
        resources.feed(page.read_text())
        assert [one for one in resources.found if re.match(r"(https?:)?//", one)] == [], page.relative_to(site)


def test_the_reference_is_generated_from_the_code(site: Path) -> None:
    from settings import Settings

    api, settings = ((site / f"reference/{name}/index.html").read_text() for name in ("api", "settings"))
    for path in ("/classify", "/classify/batch", "/explain", "/model", "/readyz"):
        assert path in api
    for name in Settings.model_fields:
        assert name.upper() in settings
    assert "deadline_exceeded" in api
    assert "Images that may wait in one API worker" in settings


def test_every_runbook_has_a_page(site: Path) -> None:
    for runbook in (REPOSITORY / "monitoring/runbooks").glob("*.md"):
        assert (site / "runbooks" / runbook.stem / "index.html").exists()
        assert f"runbooks/{runbook.stem}/" in (site / "operations/runbooks/index.html").read_text()


def test_external_links_are_well_formed() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\((https?:[^)\s]*)\)", page.read_text()):
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]{2,}(/[\w./#?=&%~+-]*)?", link), f"{page.name}: {link}"
