"""What people do with the page, as functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests
from playwright.sync_api import Locator, Page

from tests.toy import ROOT

PICTURES = sorted((ROOT / "tests/images").glob("*.jpg"))
CAT = ROOT / "tests/images/cat.jpg"


def choose(page: Page, *files: Path) -> None:
    page.set_input_files("#choose", list(files))


def drop(page: Page, *paths: Path) -> None:
    """Drop files or folders on the page, as the window system would deliver them."""
    devtools = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 300, "data": data})


def paste(page: Page, file: Path) -> None:
    script = """([name, bytes]) => {
        const clipboardData = new DataTransfer();
        clipboardData.items.add(new File([new Uint8Array(bytes)], name, {type: "image/jpeg"}));
        document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData, bubbles: true}));
    }"""
    page.evaluate(script, [file.name, list(file.read_bytes())])


def verdict(page: Page) -> str:
    """Wait for the answer and return its class."""
    name = page.locator("#class-name")
    name.wait_for()
    page.wait_for_selector("#answer[aria-busy=false]")
    return name.inner_text()


def finish(page: Page) -> None:
    """Wait until the last portion of a batch is answered."""
    page.wait_for_selector("#batch")
    page.wait_for_selector("#progress", state="hidden")


def column(page: Page, number: int) -> list[str]:
    """Cells of one column, for the rows that have an answer."""
    return page.locator(f"#rows tr:not(.failed) > :nth-child({number})").all_inner_texts()


def sort_by(page: Page, name: str) -> Locator:
    head = page.get_by_role("columnheader", name=name)
    head.get_by_role("button").click()
    return head


def ask(url: str, files: Sequence[Path], **options: Any) -> list[dict[str, Any]]:
    """What the service answers for these files when asked directly."""
    parts = [("images", (file.name, file.read_bytes(), "image/jpeg")) for file in files]
    reply = requests.post(f"{url}/classify/batch", files=parts, params=options, timeout=60)
    results: list[dict[str, Any]] = reply.json()["results"]
    return results
