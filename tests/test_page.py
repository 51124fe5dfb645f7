"""The page at ``/`` as the real server sends it; `make check-page` opens it in a browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import requests

from serving.errors import OVERLOADED
from serving.static import FOLDER
from tests.golden import IMAGES, MOST_SAMPLES, TYPICAL
from tests.live import Server, assert_error, samples
from tests.toy import ROOT

FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())
TEXTS = [path for path in FILES if path.suffix not in {".jpg", ".png"}]
OURS = {"no_file", "unknown", "unreachable", "unreadable"}
"""Error codes that the page itself creates."""
TIMEOUT = 60


def address(path: Path) -> str:
    return "/" if path.name == "index.html" else f"/page/{quote(path.relative_to(FOLDER).as_posix())}"


def get(server: Server, path: str, method: str = "GET", **headers: str) -> requests.Response:
    return requests.request(method, f"{server.url}{path}", headers=headers, timeout=TIMEOUT)


@pytest.mark.parametrize("path", FILES, ids=address)
def test_every_file_is_served_unchanged_with_strict_headers(embedded: Server, path: Path) -> None:
    reply = get(embedded, address(path))
    assert reply.status_code == 200
    assert reply.content == path.read_bytes()
    policy = dict(rule.split(" ", 1) for rule in reply.headers["Content-Security-Policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["Referrer-Policy"] == "no-referrer"
    assert reply.headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/page/samples.json"])
def test_a_cached_file_is_not_sent_again(embedded: Server, path: str) -> None:
    first = get(embedded, path)
    again = get(embedded, path, **{"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["ETag"] == first.headers["ETag"]
    assert get(embedded, path, **{"If-None-Match": '"other"'}).status_code == 200


def test_only_get_and_head_are_allowed(embedded: Server) -> None:
    head = get(embedded, "/", "HEAD")
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["Content-Length"]) == (FOLDER / "index.html").stat().st_size
    refused = get(embedded, "/", "POST")
    assert_error(refused, 405, "method_not_allowed")
    assert refused.headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "path", ["/page", "/page/", "/page/nothing.js", "/page/index.html", "/page/../service.py", "/page/%2e%2e/static.py"]
)
def test_paths_outside_the_page_are_not_found(embedded: Server, path: str) -> None:
    request = requests.Request("GET", embedded.url).prepare()
    request.url = embedded.url + path  # as written: requests would resolve the dots itself
    with requests.Session() as session:
        assert_error(session.send(request, timeout=TIMEOUT), 404, "not_found")


def test_the_page_adds_no_metric_series(embedded: Server) -> None:
    for path in FILES:
        get(embedded, address(path))
    assert not [series for series in samples(embedded.url) if "/page" in series or 'endpoint="/"' in series]


def references(path: Path) -> Iterator[str]:
    """Addresses of everything that the file makes a browser fetch."""
    for reference in re.findall(r'(?:\s(?:src|href)=|\b(?:from|import) )"([^"#]+)"', path.read_text()):
        yield "/" + reference.replace("./", "page/")


@pytest.mark.parametrize("path", TEXTS, ids=address)
def test_nothing_is_loaded_from_elsewhere_and_nothing_is_inline(embedded: Server, path: Path) -> None:
    text = path.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?://|@import|\burl\(", text)
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=\"|innerHTML|eval\(", text)
    for reference in references(path):
        assert get(embedded, reference).status_code == 200, reference


def test_samples_are_the_golden_pictures() -> None:
    """The tests know the answers for what visitors click."""
    offered = {path.name: path.read_bytes() for path in FOLDER.glob("samples/*")}
    assert offered == {path.name: path.read_bytes() for path in IMAGES[:MOST_SAMPLES]}


def test_every_error_is_explained() -> None:
    source = "\n".join(path.read_text() for path in ROOT.glob("serving/*.py"))
    codes = {OVERLOADED}
    codes |= set(re.findall(r'(?:ApiError\(|_refusal\()\s*(?:HTTPStatus\.\w+,\s*)?"([a-z_]+)"', source))
    form = (ROOT / "deploy/nginx/snippets/error_form.conf").read_text()
    codes |= set(re.findall(r"^ +\S+ +([a-z_]+);$", form, re.MULTILINE))
    words = set(re.findall(r"^  ([a-z_]+): \[", (FOLDER / "errors.js").read_text(), re.MULTILINE))
    assert {"invalid_image", "quota_exceeded", "bad_gateway"} <= codes
    assert codes <= words
    assert words - codes <= OURS | {"not_found", "method_not_allowed"}


def test_server_timing_lists_the_stages(server: Server) -> None:
    image = TYPICAL.read_bytes()
    for path, field in (("/classify", "image"), ("/classify/batch", "images")):
        reply = requests.post(f"{server.url}{path}", files={field: image}, timeout=TIMEOUT)
        told = {name: float(ms) for name, ms in re.findall(r"(\w+);dur=([\d.]+)", reply.headers["Server-Timing"])}
        assert list(told) == ["read", "decode", "classify", "reply", "total"]
        assert sum(told.values()) - told["total"] <= told["total"] + 0.1
