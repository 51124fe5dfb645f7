"""How the page handles pictures and errors: `make check-page`."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import time
from collections.abc import Callable
from datetime import date
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect

from model.store import SHIPPED
from serving import access
from tests.browser.actions import CAT, PICTURES, ask, choose, column, drop, finish, paste, sort_by, verdict
from tests.browser.conftest import PATIENCE_MS, WATCH
from tests.live import LIMITS, encode, picture, serve

expect.set_options(timeout=PATIENCE_MS)


def percent(share: float) -> str:
    """Rounded half up, as browsers do."""
    return f"{(100 * Decimal(repr(share))).quantize(Decimal('0.1'), ROUND_HALF_UP)}%"


def test_a_sample_is_classified_with_one_click(page: Page, url: str) -> None:
    page.get_by_role("button", name="Sample: cat").click()
    assert verdict(page) == "cat"
    (said,) = ask(url, [CAT], prediction_set=0.95)
    assert page.locator("#confidence").inner_text() == percent(said["confidence"])
    assert said["in_distribution"]
    expect(page.locator("#familiar")).to_contain_text("Resembles")
    bars = page.locator("#bars li").all_inner_texts()
    assert len(bars) == 10
    assert bars[0].split() == ["cat", percent(said["confidence"])]
    assert page.locator("#set li").all_inner_texts() == said["prediction_set"]
    expect(page.locator("#status")).to_contain_text("cat, ")


def test_a_sample_may_have_any_name(blank: Page, url: str) -> None:
    """Samples are named after classes, and classes after folders."""
    asked: list[str] = []

    def answer(route: Route) -> None:
        asked.append(route.request.url)
        route.fulfill(path=CAT)

    blank.route("**/model", lambda route: route.fulfill(status=500))  # the card would hide this sample
    blank.route("**/page/samples.json", lambda route: route.fulfill(json=["samples/50% no. #1?.jpg"]))
    blank.route("**/page/samples/**", answer)
    blank.goto(url)
    blank.get_by_role("button", name="Sample: 50% no. #1?").click()
    assert verdict(blank) == "cat"
    assert set(asked) == {f"{url}/page/samples/50%25%20no.%20%231%3F.jpg"}


def test_the_answer_shows_the_time_of_each_stage(page: Page) -> None:
    choose(page, CAT)
    verdict(page)
    shown = dict(line.split("\n") for line in page.locator("#stages div").all_inner_texts())
    assert list(shown) == ["Network and browser", "Receive", "Decode", "Queue and model", "Reply"]
    assert all(re.fullmatch(r"[\d.]+ m?s", text) for text in shown.values())
    assert page.locator("#stack span").count() == 5


def test_the_level_changes_the_prediction_set(page: Page, url: str, tmp_path: Path) -> None:
    files = [tmp_path / f"{seed}.png" for seed in range(32)]
    for seed, file in enumerate(files):
        file.write_bytes(encode(picture(seed)))
    narrow, wide = (
        [said["prediction_set"] for said in ask(url, files, prediction_set=level)] for level in (0.95, 0.99)
    )
    unsure = next(index for index in range(len(files)) if len(narrow[index]) < len(wide[index]))
    choose(page, files[unsure])
    verdict(page)
    expect(page.locator("#set li")).to_have_text(narrow[unsure] or ["no class is likely enough"])
    page.get_by_text("99\u202f%").click()
    expect(page.locator("#set li")).to_have_text(wide[unsure])


def test_evidence_is_drawn_over_the_picture(page: Page) -> None:
    choose(page, CAT)
    verdict(page)
    button = page.get_by_role("button", name="Show evidence")
    button.click()
    overlay = page.get_by_alt_text("Where the evidence for cat lies")
    overlay.wait_for()
    assert overlay.evaluate("image => image.decode().then(() => image.naturalWidth)") == 256
    expect(button).to_have_attribute("aria-pressed", "true")
    button.click()
    expect(overlay).to_be_hidden()
    expect(button).to_have_attribute("aria-pressed", "false")


def test_evidence_is_shown_if_and_only_if_its_button_is_pressed(page: Page) -> None:
    """Whatever else is pressed before the evidence arrives."""
    held: list[Route] = []
    page.route("**/explain", lambda route: held.append(route))
    choose(page, CAT)
    verdict(page)
    button, overlay = page.locator("#explain"), page.locator("#overlay")
    button.click()
    page.get_by_text("99\u202f%").click()
    verdict(page)
    held[0].continue_()
    overlay.wait_for()
    expect(button).to_have_attribute("aria-pressed", "true")
    button.click()
    expect(overlay).to_be_hidden()
    button.click()
    button.click()
    held[1].continue_()
    page.wait_for_timeout(500)
    expect(button).to_have_attribute("aria-pressed", "false")
    expect(overlay).to_be_hidden()


def test_a_foreign_image_is_flagged(page: Page, url: str, tmp_path: Path) -> None:
    black = tmp_path / "lens-cap.png"
    Image.new("RGB", (32, 32)).save(black)
    assert not ask(url, [black])[0]["in_distribution"]
    choose(page, black)
    verdict(page)
    expect(page.locator("#familiar")).to_contain_text("do not rely on this answer")


@pytest.mark.parametrize("name", ["a,b.jpg", "a;b.jpg", "the cat's.jpg", 'a "cat".jpg', "back\\slash.jpg", " cat.jpg"])
def test_the_copied_command_works_for_any_file_name(page: Page, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CAT.read_bytes())
    choose(page, tmp_path / name)
    verdict(page)
    page.locator("summary").click()
    run = subprocess.run(
        ["sh", "-c", page.locator("#curl").inner_text()], cwd=tmp_path, capture_output=True, check=False, timeout=60
    )
    assert (run.returncode, json.loads(run.stdout)["class_name"]) == (0, "cat"), run.stderr


@pytest.mark.parametrize("bring", [drop, paste, choose])
def test_pictures_are_accepted_every_way(page: Page, bring: object) -> None:
    bring(page, CAT.with_name("dog.jpg"))  # type: ignore[operator]
    assert verdict(page) == "dog"
    expect(page.locator("#caption")).to_have_text("dog.jpg, 32 \u00d7 32 pixels")
    expect(page.locator("#veil")).to_be_hidden()


def test_a_photo_can_be_taken_with_the_camera(page: Page) -> None:
    assert page.locator("#photo").get_attribute("capture") == "environment"
    page.set_input_files("#photo", CAT)
    assert verdict(page) == "cat"


def test_a_drop_without_files_is_explained(page: Page) -> None:
    page.evaluate("document.body.dispatchEvent(new ClipboardEvent('paste', {bubbles: true}))")
    expect(page.get_by_role("alert")).to_contain_text("There was no picture in that")


def test_a_folder_becomes_a_sortable_table_and_a_csv(page: Page, url: str, tmp_path: Path, broken: Path) -> None:
    folder = tmp_path / "=folder"
    (folder / "deep").mkdir(parents=True)
    for file in [*PICTURES, broken]:
        (folder / file.name).write_bytes(file.read_bytes())
        (folder / "deep" / file.name).write_bytes(file.read_bytes())
    drop(page, folder)
    finish(page)
    expect(page.locator("#batch-summary")).to_have_text("20 of 22 classified, 2 failed")

    expect(sort_by(page, "Confidence")).to_have_attribute("aria-sort", "ascending")
    ascending = column(page, 4)
    values = [float(text.strip(">< %")) for text in ascending]
    assert values == sorted(values)
    assert "failed" in (page.locator("#rows tr").last.get_attribute("class") or "")
    expect(sort_by(page, "Confidence")).to_have_attribute("aria-sort", "descending")
    assert column(page, 4) == ascending[::-1]
    assert "failed" in (page.locator("#rows tr").last.get_attribute("class") or "")
    sort_by(page, "Class")
    assert column(page, 3) == sorted(column(page, 3))

    with page.expect_download() as saved:
        page.get_by_role("button", name="Download CSV").click()
    with saved.value.path().open(newline="") as file:
        lines = {line["file"]: line for line in csv.DictReader(file)}
    assert set(lines) == {f"'=folder/{path}{file.name}" for path in ("", "deep/") for file in [*PICTURES, broken]}
    for file, said in zip(PICTURES, ask(url, PICTURES, prediction_set=0.95), strict=True):
        line = lines[f"'=folder/deep/{file.name}"]
        assert (line["class_name"], line["model"]) == (said["class_name"], said["model"])
        assert float(line["confidence"]) == said["confidence"]
        assert line["prediction_set"].split() == said["prediction_set"]
        assert float(line["probability cat"]) == said["all_probabilities"]["3"]
    assert lines["'=folder/=broken.jpg"]["error_code"] == "invalid_image"
    assert re.fullmatch("[0-9a-f]{32}", lines["'=folder/=broken.jpg"]["request_id"])

    page.get_by_role("button", name="=folder/deep/frog.jpg", exact=True).click()
    assert verdict(page) == "frog"


def test_a_large_folder_is_shown_in_parts_but_classified_whole(page: Page, tmp_path: Path) -> None:
    """A browser lays out the whole table again for every answer: with thousands of rows, the page would freeze."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(205):
        (folder / f"{number}.jpg").write_bytes(PICTURES[number % len(PICTURES)].read_bytes())
    drop(page, folder)
    finish(page)
    expect(page.locator("#batch-summary")).to_have_text("205 of 205 classified")
    rows = page.locator("#rows tr")
    expect(rows).to_have_count(200)
    sort_by(page, "File")
    sort_by(page, "File")
    assert column(page, 2)[0] == "folder/204.jpg"
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download CSV").click()
    with saved.value.path().open(newline="") as file:
        assert len([line for line in csv.DictReader(file) if line["class_name"]]) == 205
    more = page.get_by_role("button", name="Show more")
    more.click()
    expect(rows).to_have_count(205)
    expect(more).to_be_hidden()


def test_a_row_keeps_the_focus_while_answers_arrive(page: Page) -> None:
    held: list[Route] = []
    page.route("**/classify/batch*", lambda route: held.append(route))
    choose(page, *PICTURES, *PICTURES)
    sort_by(page, "Confidence")
    name = page.locator("#rows button").first.element_handle()
    name.focus()
    for portion in range(2):
        while len(held) == portion:
            page.wait_for_timeout(20)
        held[portion].continue_()
    finish(page)
    assert name.evaluate("element => element === document.activeElement")


def test_portions_too_large_for_the_service_are_halved(page: Page, tmp_path: Path) -> None:
    files = [tmp_path / f"{index}.bmp" for index in range(6)]
    for index, file in enumerate(files):
        file.write_bytes(encode(picture(index, 500, 400), "BMP"))
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) < LIMITS["MAX_IMAGE_BYTES"] < LIMITS["MAX_BODY_BYTES"] < sum(sizes)
    choose(page, *files)
    finish(page)
    expect(page.locator("#batch-summary")).to_have_text("6 of 6 classified")


def test_a_batch_can_be_stopped_and_resumed(page: Page) -> None:
    slow = True

    def hold(route: Route) -> None:
        if not slow:
            route.continue_()

    page.route("**/classify/batch*", hold)
    choose(page, *PICTURES)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#batch-summary")).to_have_text("0 of 10 classified")
    slow = False
    page.get_by_role("button", name="Try the failed again").click()
    expect(page.locator("#batch-summary")).to_have_text("10 of 10 classified")


def test_a_file_deleted_during_a_batch_fails_alone(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("1.jpg", "2.jpg", "deleted.jpg"):
        (folder / name).write_bytes(CAT.read_bytes())
    page.route("**/classify/batch*", lambda route: None)  # held until the batch is stopped
    drop(page, folder)
    page.get_by_role("button", name="Stop").click()
    (folder / "deleted.jpg").unlink()
    page.unroute("**/classify/batch*")
    page.get_by_role("button", name="Try the failed again").click()
    expect(page.locator("#batch-summary")).to_have_text("2 of 3 classified, 1 failed")
    assert sorted(column(page, 2)) == ["folder/1.jpg", "folder/2.jpg"]
    expect(page.locator("#rows .failed")).to_contain_text("This file cannot be read (unreadable)")
    page.get_by_role("button", name="folder/deleted.jpg").click()
    expect(page.get_by_role("alert")).to_contain_text("This file cannot be read")


def test_an_unreadable_entry_of_a_dropped_folder_fails_alone(page: Page) -> None:
    page.evaluate(
        """() => {
            const { webkitGetAsEntry } = DataTransferItem.prototype;
            const fail = (_, reject) => reject(new DOMException("said by a test", "NotReadableError"));
            DataTransferItem.prototype.webkitGetAsEntry = function () {
                const lost = { name: "lost.jpg", fullPath: "/folder/lost.jpg", isFile: true, file: fail };
                const folder = (name, readEntries) => ({
                    name, fullPath: `/folder/${name}`, createReader: () => ({ readEntries }),
                });
                const portions = [[lost, folder("locked", fail), webkitGetAsEntry.call(this)], []];
                return folder("", (resolve) => resolve(portions.shift()));
            };
        }"""
    )
    drop(page, CAT)
    finish(page)
    expect(page.locator("#batch-summary")).to_have_text("1 of 3 classified, 2 failed")
    names = page.locator("#rows .failed > :nth-child(2)").all_inner_texts()
    assert names == ["folder/lost.jpg", "folder/locked"]


def test_a_broken_image_is_explained(page: Page, broken: Path) -> None:
    with page.expect_response("**/classify*") as answered:
        choose(page, broken)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("This picture cannot be read")
    expect(alert).to_contain_text("invalid_image")
    expect(alert).to_contain_text(answered.value.headers["x-request-id"])
    expect(page.locator("#verdict")).to_be_hidden()


def test_a_file_over_the_limit_is_explained(page: Page, tmp_path: Path) -> None:
    large = tmp_path / "large.bmp"
    large.write_bytes(encode(picture(0, 600, 600), "BMP"))
    assert large.stat().st_size > LIMITS["MAX_IMAGE_BYTES"]
    choose(page, large)
    expect(page.get_by_role("alert")).to_contain_text("This file is too large")


def error(status: int, code: str, **headers: str) -> dict[str, object]:
    return {
        "status": status,
        "headers": headers,
        "json": {"error": {"code": code, "message": "said by a test", "request_id": "abc"}},
    }


@pytest.mark.parametrize(("status", "code"), [(429, "overloaded"), (503, "not_ready"), (502, "bad_gateway")])
def test_the_page_waits_for_as_long_as_retry_after_says(page: Page, status: int, code: str) -> None:
    attempts: list[float] = []

    def refuse_once(route: Route) -> None:
        attempts.append(time.monotonic())
        if len(attempts) == 1:
            route.fulfill(**error(status, code, **{"Retry-After": "2"}))  # type: ignore[arg-type]
        else:
            route.continue_()

    page.route("**/classify*", refuse_once)
    choose(page, CAT)
    expect(page.locator(".waiting")).to_contain_text("next attempt in")
    assert verdict(page) == "cat"
    assert attempts[1] - attempts[0] >= 2


def test_the_page_gives_up_when_told_to_wait_long(page: Page) -> None:
    page.route(
        "**/classify*",
        lambda route: route.fulfill(**error(429, "quota_exceeded", **{"Retry-After": "7200"})),  # type: ignore[arg-type]
    )
    choose(page, CAT)
    expect(page.get_by_role("alert")).to_contain_text("The service asks to wait 2 hours")


def test_a_batch_ends_when_told_to_wait_long(page: Page) -> None:
    requests: list[Route] = []

    def refuse(route: Route) -> None:
        requests.append(route)
        route.fulfill(**error(429, "rate_limited", **{"Retry-After": "60"}))  # type: ignore[arg-type]

    page.route("**/classify/batch*", refuse)
    choose(page, *PICTURES * 4)
    finish(page)
    expect(page.locator("#batch-summary")).to_have_text("0 of 40 classified, 16 failed")
    assert len(requests) == 1


@pytest.mark.parametrize("bring", [choose, lambda page, _: page.get_by_role("button", name="Sample: cat").click()])
def test_an_unreachable_service_is_explained_and_can_be_retried(
    page: Page, bring: Callable[[Page, Path], None]
) -> None:
    page.context.set_offline(True)
    bring(page, CAT)
    expect(page.get_by_role("alert")).to_contain_text("The service cannot be reached")
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    assert verdict(page) == "cat"


@pytest.mark.parametrize(("status", "code"), [(504, "deadline_exceeded"), (500, "internal")])
def test_errors_that_waiting_does_not_help_are_explained_at_once(page: Page, status: int, code: str) -> None:
    page.route("**/classify*", lambda route: route.fulfill(**error(status, code)))  # type: ignore[arg-type]
    choose(page, CAT)
    expect(page.get_by_role("alert")).to_contain_text(code)


def test_replies_that_are_not_the_services_are_explained(page: Page) -> None:
    page.route("**/classify*", lambda route: route.fulfill(status=418, body="<h1>a proxy</h1>"))
    choose(page, CAT)
    expect(page.get_by_role("alert")).to_contain_text("HTTP status 418")


def test_an_api_key_is_asked_for_and_its_rate_respected(blank: Page, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    key = access.add(keys, "alice", images_per_second=0.5)
    with serve("embedded", tmp_path / "home", API_KEYS=keys, WORKERS=1) as url:
        blank.goto(url)
        field = blank.get_by_label("API key")
        field.fill("schlüssel…")  # not allowed in a header
        field.press("Enter")
        assert not field.evaluate("field => field.validity.valid")
        field.fill("wrong")
        field.press("Enter")
        expect(field).to_be_visible()
        field.fill(key)
        field.press("Enter")
        expect(field).to_be_hidden()
        blank.get_by_role("button", name="Sample: cat").click()
        assert verdict(blank) == "cat"
        command = blank.locator("#curl").text_content() or ""
        assert command.startswith('curl -H "Authorization: Bearer $API_KEY" -F ')
        assert key not in command
        blank.get_by_role("button", name="Sample: dog").click()
        expect(blank.locator(".waiting")).to_contain_text("Too many pictures at once for this API key")
        expect(blank.locator("#class-name")).to_have_text("dog")
        assert blank.evaluate("[localStorage.length, document.cookie]") == [0, ""]


def test_an_expired_key_can_be_replaced(blank: Page, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    expired, key = access.add(keys, "alice", expires=date(2020, 1, 1)), access.add(keys, "bob")
    with serve("embedded", tmp_path / "home", API_KEYS=keys, WORKERS=1) as url:
        blank.goto(url)
        field = blank.get_by_label("API key")
        field.fill(expired)
        field.press("Enter")
        blank.get_by_role("button", name="Sample: cat").click()
        expect(blank.get_by_role("alert")).to_contain_text("This API key may not do that")
        field.fill(key)
        field.press("Enter")
        assert verdict(blank) == "cat"


def test_the_model_card_is_shown_in_words(page: Page) -> None:
    shipped = json.loads((SHIPPED / "card.json").read_text())
    figures = shipped["metrics"]["onnx-int8"]
    card = page.get_by_role("region", name="About this model")
    expect(card).to_contain_text(percent(figures["accuracy"]))
    expect(card).to_contain_text(f"{shipped['training']['images']['train']:,} pictures")
    expect(card).to_contain_text(shipped["git_commit"])
    for name, share in figures["per_class"].items():
        expect(card.get_by_role("listitem").filter(has_text=name).first).to_contain_text(percent(share))
    about = f"right on {percent(figures['accuracy'])} of {figures['images']:,} test pictures."
    expect(page.locator("#about")).to_contain_text(about)


def test_the_card_of_a_network_trained_elsewhere_with_many_classes_is_shown(blank: Page, url: str) -> None:
    classes = [f"kind {number}" for number in range(1000)]
    confusion = [[8 * (truth == taken) + (truth == 7 and taken == 9) for taken in range(1000)] for truth in range(1000)]
    shipped = json.loads((SHIPPED / "card.json").read_text())
    figures = shipped["metrics"]["onnx-int8"]
    figures |= {"per_class": {name: 1 - (name == "kind 7") / 9 for name in classes}, "confusion": confusion}
    origin = {"network": "resnet.onnx", "source": "birds", "images": {"train": 9000, "val": 2000}, "parameters": 11_000}
    card = {
        "name": "birds",
        "version": "1",
        "classes": classes,
        "input_size": [224, 224],
        "git_commit": "abc",
        "runtime": "onnx-int8",
        "topology": "embedded",
        "metrics": {"onnx-int8": figures},
        "training": origin,
    }
    blank.route("**/model", lambda route: route.fulfill(json=card))
    blank.goto(url)
    about = blank.get_by_role("region", name="About this model")
    expect(about).to_contain_text("elsewhere, as resnet.onnx")
    expect(about).to_contain_text("2,000 pictures of birds")
    expect(about).to_contain_text("the lowest 20 of 1,000")
    expect(about.locator(".bars li")).to_have_count(20)
    expect(about.locator(".bars li").first).to_contain_text("kind 7")
    expect(about.locator(".chips li")).to_have_text(["kind 7, taken for kind 9: 11.1%"])


def test_a_card_that_failed_to_load_is_requested_again(blank: Page, url: str) -> None:
    blank.route("**/model", lambda route: route.fulfill(status=500))
    blank.goto(url)
    expect(blank.locator("#about")).to_contain_text("cannot be told at the moment")
    blank.unroute("**/model")
    blank.get_by_role("button", name="Sample: cat").click()
    assert verdict(blank) == "cat"
    expect(blank.locator("#bars li").first).to_contain_text("cat")
    expect(blank.locator("#about")).to_contain_text("10 classes")


def test_the_policy_is_enforced_and_its_violations_are_seen(browser: Browser, url: str) -> None:
    """Proves that the fixture would notice if the page broke its own policy."""
    page = browser.new_page()
    page.add_init_script(WATCH)
    page.goto(url)
    page.evaluate(
        "document.head.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    )
    page.wait_for_function("window.violations.length")
    assert page.evaluate("[window.violations[0], window.ran ?? null]") == ["script-src-elem", None]
    page.close()
