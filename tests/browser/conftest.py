"""The real server, and Debian's Chromium to open its page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.live import LIMITS, serve

PATIENCE_MS = 60_000
"""Generous, for a machine that is busy with other work."""
VIEWS: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1200, "height": 860}},
    "dark": {"viewport": {"width": 1200, "height": 860}, "color_scheme": "dark"},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "is_mobile": True,
        "has_touch": True,
        "device_scale_factor": 2,
    },
}
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve("embedded", tmp_path_factory.mktemp("home"), **LIMITS, WORKERS=1) as url:
        yield url


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # No sandbox: containers, such as CI's, lack the rights to create one. Only our own page is opened.
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def view() -> str:
    """The default viewport; tests parametrize it to use another."""
    return "light"


@pytest.fixture
def blank(browser: Browser, view: str) -> Iterator[Page]:
    """A blank tab that fails its test on any script error or violation of the Content-Security-Policy."""
    context = browser.new_context(**VIEWS[view], accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.add_init_script(WATCH)
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    yield page
    violations = page.evaluate("window.violations ?? []")
    context.close()
    assert failures == []
    assert violations == []


@pytest.fixture
def page(blank: Page, url: str) -> Page:
    """The page, once its samples and the model card are shown."""
    blank.goto(url)
    blank.wait_for_selector(".sample")
    return blank


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A file that starts like a JPEG but holds no image, with a name that a spreadsheet would run as a formula."""
    file = tmp_path / "=broken.jpg"
    file.write_bytes(b"\xff\xd8\xff\xe0 and no more")
    return file
