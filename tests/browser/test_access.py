"""Accessibility: keyboard, phone, dark mode, reduced motion, and axe's rules in each. UPDATE=1 draws docs/images."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.browser.actions import CAT, PICTURES, choose, finish, sort_by, verdict
from tests.browser.conftest import VIEWS
from tests.toy import ROOT

AXE = (ROOT / "tests/node/node_modules/axe-core/axe.min.js").read_text()
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
IMAGES = ROOT / "docs/images"
MAX_BYTES = 200_000
every_view = pytest.mark.parametrize("view", VIEWS)


def violations(page: Page) -> list[str]:
    page.evaluate(AXE)
    page.wait_for_timeout(400)  # colours in mid-transition would fail the contrast rule
    found: dict[str, Any] = page.evaluate("rules => axe.run({runOnly: rules})", RULES)
    assert len(found["passes"]) > 20
    return [f"{rule['id']}: {node['html']}" for rule in found["violations"] for node in rule["nodes"]]


def scrolls_sideways(page: Page) -> bool:
    return bool(page.evaluate("document.scrollingElement.scrollWidth > innerWidth"))


@every_view
def test_axe_finds_no_violation_in_any_state(page: Page, broken: Path) -> None:
    """Empty, an answer with evidence, a table, an error, an API key."""
    assert violations(page) == []
    choose(page, CAT)
    verdict(page)
    page.get_by_role("button", name="Show evidence").click()
    page.locator("#overlay").wait_for()
    page.locator("summary").click()
    choose(page, *PICTURES, broken)
    finish(page)
    sort_by(page, "Class")
    assert violations(page) == []
    choose(page, broken)
    page.get_by_role("alert").wait_for()
    page.evaluate("document.dispatchEvent(new Event('key-wanted'))")
    assert violations(page) == []


@pytest.mark.parametrize("view", ["phone"])
@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_scrolls_in_one_direction_only(page: Page, broken: Path, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    assert not scrolls_sideways(page)
    expect(page.get_by_text("Take a photo")).to_be_visible()
    page.locator(".sample").first.tap()
    verdict(page)
    expect(page.locator("#class-name")).to_be_in_viewport()
    assert not scrolls_sideways(page)
    page.locator("summary").tap()
    choose(page, *PICTURES, broken)
    finish(page)
    assert not scrolls_sideways(page)
    choose(page, broken)
    page.get_by_role("alert").wait_for()
    assert not scrolls_sideways(page)


@pytest.mark.parametrize(("view", "is_dark"), [("light", False), ("dark", True)])
def test_colours_follow_the_system(page: Page, is_dark: bool) -> None:
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in colour[4:-1].split(",")) < 3 * 64) is is_dark


def focused(page: Page) -> str:
    """The accessible name of the focused element, which must be visibly focused."""
    seen = """() => {
        const element = document.activeElement;
        const shown = element.matches("input") ? element.labels[0].querySelector("span") ?? element.labels[0] : element;
        if (getComputedStyle(shown).outlineStyle === "none") return "unseen: " + element.outerHTML;
        const image = element.querySelector("img");
        return element.innerText || image?.alt || element.ariaLabel || element.value || element.id;
    }"""
    return str(page.evaluate(seen))


def tab_to(page: Page, name: str, key: str = "Tab") -> None:
    passed = []
    for _ in range(60):
        page.keyboard.press(key)
        passed.append(focused(page))
        assert not passed[-1].startswith("unseen"), passed[-1]
        if passed[-1].startswith(name):
            return
    raise AssertionError(f"{name!r} is not reached by {key}: {passed}")


def test_everything_works_by_keyboard(page: Page) -> None:
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to the content"
    tab_to(page, "Sample: ship")
    page.keyboard.press("Enter")
    assert verdict(page) == "ship"
    tab_to(page, "0.95")
    with page.expect_request("**/classify?prediction_set=0.99"):
        page.keyboard.press("ArrowRight")
    expect(page.locator("input[value='0.99']")).to_be_checked()
    tab_to(page, "The same from a terminal")
    page.keyboard.press("Enter")
    expect(page.locator("#curl")).to_contain_text("curl -F")
    tab_to(page, "Show evidence", "Shift+Tab")
    page.keyboard.press("Space")
    expect(page.get_by_alt_text("Where the evidence for ship lies")).to_be_visible()

    choose(page, *PICTURES)  # the system's file dialog is not part of the page
    finish(page)
    tab_to(page, "Download CSV")
    tab_to(page, "Confidence")
    page.keyboard.press("Enter")
    expect(page.get_by_role("columnheader", name="Confidence")).to_have_attribute("aria-sort", "ascending")
    assert focused(page).startswith("Confidence")
    tab_to(page, "ship.jpg")
    page.keyboard.press("Enter")
    expect(page.locator("#caption")).to_contain_text("ship.jpg")


def test_the_file_chooser_opens_by_keyboard(page: Page) -> None:
    tab_to(page, "choose")
    with page.expect_file_chooser() as opened:
        page.keyboard.press("Space")
    assert opened.value.is_multiple()


def test_motion_is_reduced_on_request(page: Page) -> None:
    choose(page, CAT)
    verdict(page)
    durations = (
        "[...document.querySelectorAll('.button, .sample img').values().map(e => getComputedStyle(e)), "
        "getComputedStyle(document.querySelector('.bar'), '::before')].map(style => style.transitionDuration)"
    )
    assert set(page.evaluate(durations)) != {"0s"}
    page.emulate_media(reduced_motion="reduce")
    assert set(page.evaluate(durations)) == {"0s"}


@every_view
def test_pictures_of_the_page_are_small(page: Page, view: str) -> None:
    """Small enough for the repository; UPDATE=1 writes them into it."""
    page.locator(".sample").nth(5).click()
    verdict(page)
    if view == "dark":
        page.get_by_role("button", name="Show evidence").click()
        page.locator("#overlay").wait_for()
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(500)  # while the bars grow
    file = io.BytesIO()
    shot = Image.open(io.BytesIO(page.screenshot(full_page=view != "phone")))
    shot.convert("RGB").quantize(256, kmeans=1).save(file, "PNG", optimize=True)
    assert len(file.getvalue()) < MAX_BYTES
    if os.environ.get("UPDATE"):
        (IMAGES / f"page-{view}.png").write_bytes(file.getvalue())
