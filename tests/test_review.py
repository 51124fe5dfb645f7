"""The store of images for human review: what is kept, that its limits hold, and how it is sorted for labelling."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from model.classifier import Prediction
from serving import review
from serving.review import BLOCK, LEDGER, Review
from settings import load
from tests import toy
from tests.live import encode, picture, python, serve
from train.review import Outcome, Verdict, sort

PAIR = 2 * BLOCK
"""Disk space of a small image and its line."""
REPLIED = ("confidence", "in_distribution")
"""What the line of an image has under the same name as the reply."""
ABOUT = {"request_id": "r", "key": "alice", "model": "toy:1"}


def store(directory: Path, **settings: Any) -> Review:
    return Review(load(review_directory=directory, **{"review_share": 1, "review_below": 0.6, **settings}))


def unsure(confidence: float = 0.5) -> Prediction:
    return Prediction(1, "frame", np.array([1 - confidence, confidence], np.float32), True)


def images(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.suffix == ".png")


def size(directory: Path) -> int:
    return sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in directory.iterdir() if path.name != LEDGER)


def wait(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def offer(kept: Review, *seeds: int) -> None:
    """Offer images one by one, each once the thread has taken the previous one."""
    for seed in seeds:
        wait(kept._waiting.empty)
        kept.offer(encode(picture(seed)), unsure(), ABOUT)
    wait(kept._waiting.empty)


def test_an_image_is_kept_as_sent_with_its_verdict(tmp_path: Path) -> None:
    kept = store(tmp_path)
    data = encode(picture())
    kept.offer(data, unsure(), ABOUT)
    kept.offer(data, unsure(), ABOUT)  # kept once, not twice
    name = hashlib.sha256(data).hexdigest()
    wait(lambda: (tmp_path / f"{name}.json").exists())
    wait(kept._waiting.empty)
    assert (tmp_path / f"{name}.png").read_bytes() == data
    (line,) = (tmp_path / f"{name}.json").read_text().splitlines()
    about = json.loads(line)
    assert about.pop("time").endswith("+00:00")
    verdict = {"class": "frame", "confidence": 0.5, "in_distribution": True, "probabilities": [0.5, 0.5]}
    assert about == {**ABOUT, "sha256": name, **verdict}
    assert len(list(tmp_path.iterdir())) == 3
    assert int((tmp_path / LEDGER).read_text()) == size(tmp_path) == PAIR


def test_only_the_configured_share_of_uncertain_images_is_kept(tmp_path: Path) -> None:
    kept = store(tmp_path, review_share=0.5, review_below=0.6)
    kept._keep = lambda candidate: taken.append(candidate)  # type: ignore[method-assign]
    taken: list[Any] = []
    for _ in range(1000):
        kept.offer(b"", unsure(0.61), ABOUT)
    assert kept._waiting.empty()
    assert not taken
    for _ in range(1000):
        kept.offer(b"", unsure(0.59), ABOUT)
    wait(kept._waiting.empty)
    assert 400 < len(taken) < 600


def test_the_oldest_images_are_deleted_when_the_store_is_full(tmp_path: Path) -> None:
    kept = store(tmp_path, review_bytes=2**20)
    room = 2**20 // PAIR
    offer(kept, *range(room))
    wait(lambda: len(images(tmp_path)) == room)
    first, last = (hashlib.sha256(encode(picture(seed))).hexdigest() for seed in (0, room))
    os.utime(tmp_path / f"{first}.png", (time.time() - 60,) * 2)
    os.utime(tmp_path / f"{first}.json", (time.time() - 60,) * 2)
    offer(kept, room)
    wait((tmp_path / f"{last}.json").exists)
    assert not (tmp_path / f"{first}.png").exists()
    assert not (tmp_path / f"{first}.json").exists()
    assert 0.8 * room < len(images(tmp_path)) <= room
    assert int((tmp_path / LEDGER).read_text()) == size(tmp_path) <= 2**20


def test_a_large_image_makes_room_for_itself(tmp_path: Path) -> None:
    kept = store(tmp_path, review_bytes=2**20)
    for seed in range(12):
        data = encode(picture(seed)) + bytes(180_000)
        kept.offer(data, unsure(), ABOUT)
        wait((tmp_path / f"{hashlib.sha256(data).hexdigest()}.json").exists)
        assert size(tmp_path) <= 2**20


def test_the_size_limit_holds_for_all_processes_that_share_the_directory(tmp_path: Path) -> None:
    stores = [store(tmp_path, review_bytes=2**20) for _ in range(3)]
    largest = 0
    threads = [
        threading.Thread(target=offer, args=(kept, *range(100 * number, 100 * number + 90)))
        for number, kept in enumerate(stores)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with (tmp_path / LEDGER).open("a+") as ledger:
            review.fcntl.flock(ledger, review.fcntl.LOCK_EX)
            largest = max(largest, size(tmp_path))
        time.sleep(0.01)
    assert 0.8 * 2**20 < largest <= 2**20
    assert {path.stem for path in images(tmp_path)} == {path.stem for path in tmp_path.glob("*.json")}


def test_an_image_larger_than_the_store_displaces_no_other(tmp_path: Path) -> None:
    kept = store(tmp_path, review_bytes=2**20)
    offer(kept, 1)
    kept.offer(encode(picture(0, 700, 700), "BMP"), unsure(), ABOUT)
    offer(kept, 2)
    wait(lambda: len(images(tmp_path)) == 2)
    assert not list(tmp_path.glob("*.bmp"))


def test_images_are_deleted_when_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review, "SWEEP_SECONDS", 0.2)
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "README").touch()
    for other in ("lost+found", "README"):
        os.utime(tmp_path / other, (0, 0))
    kept = store(tmp_path, review_days=1)
    offer(kept, 0, 1)
    wait(lambda: len(list(tmp_path.glob("*.json"))) == 2)
    old = images(tmp_path)[0]
    for path in (old, old.with_suffix(".json")):
        os.utime(path, (time.time() - 86_401,) * 2)
    wait(lambda: not old.exists() and not old.with_suffix(".json").exists())
    wait(lambda: int((tmp_path / LEDGER).read_text() or 0) == PAIR)
    assert len(images(tmp_path)) == 1
    assert (tmp_path / "README").exists(), "it is not ours"


def test_a_full_disk_leaves_no_partial_files_and_is_logged_once(tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: a write stops half-way with an operating system error."""
    program = f"""
import resource, time
from tests.test_review import *
directory = Path({str(tmp_path)!r})
kept = store(directory)
wait((directory / LEDGER).exists)
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
offer(kept, *range(20))
time.sleep(0.3)
assert [path.name for path in directory.iterdir()] == [LEDGER], list(directory.iterdir())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
offer(kept, 21)
wait(lambda: len(list(directory.glob("*.json"))) == 1)
"""
    assert python(tmp_path, "-c", program).stderr.count("images for review are not kept") == 1


def test_a_full_disk_does_not_damage_the_ledger(tmp_path: Path) -> None:
    program = f"""
import resource, time
from tests.test_review import *
directory = Path({str(tmp_path)!r})
kept = store(directory)
offer(kept, 1)
wait(lambda: len(list(directory.glob("*.json"))) == 1)
before = (directory / LEDGER).read_text()
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
offer(kept, 2)
time.sleep(0.3)
assert (directory / LEDGER).read_text() == before != "", before
"""
    python(tmp_path, "-c", program)


def test_images_waiting_in_memory_are_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = encode(picture())
    kept = store(tmp_path, max_body_bytes=10 * len(data))
    wait(lambda: (tmp_path / LEDGER).exists() and (tmp_path / LEDGER).stat().st_size > 0)  # the first sweep is over
    for _ in range(2):  # what was taken makes room again
        with (tmp_path / LEDGER).open("a+") as ledger, caplog.at_level(logging.ERROR):
            review.fcntl.flock(ledger, review.fcntl.LOCK_EX)  # as if the disk hung
            kept.offer(data, unsure(), ABOUT)
            wait(kept._waiting.empty)  # the thread has it, and hangs
            for _ in range(100):
                kept.offer(data, unsure(), ABOUT)
            assert kept._waiting.qsize() == 10
        wait(kept._waiting.empty)
    assert not caplog.records


def test_a_server_keeps_the_images_it_is_sent(tmp_path: Path) -> None:
    directory = tmp_path / "review"
    sent = [encode(picture(seed)) for seed in range(100)]
    with serve("embedded", tmp_path / "home", REVIEW_BELOW=1, REVIEW_SHARE=1, REVIEW_DIRECTORY=directory) as url:
        parts = [("images", image) for image in (*sent[:-1], b"no image")]
        results = requests.post(f"{url}/classify/batch", files=parts, timeout=60).json()["results"]
        result = requests.post(f"{url}/classify", files={"image": sent[-1]}, timeout=60).json()
        wait(lambda: len(list(directory.glob("*.json"))) == 100)
    for data, reply in zip(sent, [*results[:-1], result], strict=True):
        name = hashlib.sha256(data).hexdigest()
        about = json.loads((directory / f"{name}.json").read_text())
        assert (directory / f"{name}.png").read_bytes() == data
        assert {"class": reply["class_name"], **{k: reply[k] for k in REPLIED}}.items() <= about.items()
        assert (about["request_id"], about["model"], about["key"]) == (reply["request_id"], reply["model"], None)


def kept_images(directory: Path, *verdicts: Prediction) -> list[str]:
    """Let the store keep an image of each verdict; returns the names of their files."""
    directory.mkdir(exist_ok=True)
    kept = store(directory)
    names = []
    for seed, verdict in enumerate(verdicts):
        data = encode(picture(seed))
        wait(kept._waiting.empty)
        kept.offer(data, verdict, ABOUT)
        names.append(f"{hashlib.sha256(data).hexdigest()}.png")
    wait(lambda: sum(line.stat().st_size > 0 for line in directory.glob("*.json")) == len(names))
    return names


def verdict(class_name: str, confidence: float, in_distribution: bool = True) -> Prediction:
    return Prediction(0, class_name, np.array([confidence, 1 - confidence], np.float32), in_distribution)


def found(folder: Path) -> list[str]:
    """The files in a folder that do not begin with a dot."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("[!.]*") if path.is_file())


def test_kept_images_are_sorted_into_folders_of_their_verdicts(tmp_path: Path) -> None:
    review, out = tmp_path / "review", tmp_path / "out"
    told = verdict("big frame", 0.5), verdict("disc", 0.25, in_distribution=False), verdict("disc", 0.5)
    names = kept_images(review, *told)
    before = {path: path.read_bytes() for path in review.iterdir()}
    printed = toy.run("train.review", review, out)
    assert printed == (
        f"{out}: 3 new images, 0 copied before, 0 skipped\n"
        "class      images  mean confidence  foreign\n"
        "big frame  1       0.500            0\n"
        "disc       2       0.375            1\n"
    )
    assert found(out) == sorted([f"big frame/{names[0]}", f"disc/{names[1]}", f"disc/{names[2]}"])
    assert (out / "disc" / names[1]).read_bytes() == encode(picture(1))
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert {path: path.read_bytes() for path in review.iterdir()} == before


def test_what_a_person_has_done_with_the_copies_is_not_undone(tmp_path: Path) -> None:
    review, out = tmp_path / "review", tmp_path / "out"
    names = kept_images(review, *[verdict("disc", 0.5)] * 4)
    sort(review, out)
    (out / "frame" / "checked").mkdir(parents=True)
    (out / "disc" / names[0]).rename(out / "frame" / "checked" / names[0])
    (out / "disc" / names[1]).unlink()
    (out / "disc" / names[2]).rename(tmp_path / names[2])  # as if merged with the training images
    (out / "disc" / names[3]).write_bytes(b"cropped")
    kept_images(review, *[verdict("disc", 0.5)] * 4, verdict("disc", 0.375))
    copied, before, skipped = sort(review, out)
    assert (copied, before, skipped) == ([Verdict("disc", 0.375, False)], 4, [])
    assert len(found(out)) == 3
    assert (out / "disc" / names[3]).read_bytes() == b"cropped"


def test_images_that_are_in_the_folder_without_a_record_are_not_copied_again(tmp_path: Path) -> None:
    """As after a call that was killed."""
    review, out = tmp_path / "review", tmp_path / "out"
    (name,) = kept_images(review, verdict("disc", 0.5))
    (out / "frame").mkdir(parents=True)
    (out / "frame" / name).write_bytes(encode(picture(0)))
    assert sort(review, out) == Outcome([], 1, [])
    assert found(out) == [f"frame/{name}"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (None, r"no [0-9a-f]{64}\.json"),
        ("", "JSONDecodeError"),
        ('{"class": "disc"', "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"class": "disc"}', "KeyError"),
        ('{"class": "disc", "confidence": null}', "TypeError"),
        ('{"class": "../disc", "confidence": 0.5}', r"class '\.\./disc'"),
        ('{"class": "", "confidence": 0.5}', "class ''"),
        ('{"class": 5, "confidence": 0.5}', "class 5"),
    ],
)
def test_an_image_without_a_whole_line_is_named_and_left(line: str | None, reason: str, tmp_path: Path) -> None:
    review, out = tmp_path / "review", tmp_path / "out"
    name, other = kept_images(review, *[verdict("disc", 0.5)] * 2)
    beside = (review / name).with_suffix(".json")
    whole = beside.read_bytes()
    beside.unlink() if line is None else beside.write_text(line)
    copied, _, (skipped,) = sort(review, out)
    assert re.fullmatch(f"{name}: .*{reason}.*", skipped)
    assert len(copied) == 1
    assert found(tmp_path / "out") == [f"disc/{other}"]
    beside.write_bytes(whole)  # the service had not finished
    assert sort(review, out) == Outcome([Verdict("disc", 0.5, False)], 1, [])


def test_a_damaged_image_is_named_and_left(tmp_path: Path) -> None:
    review, out = tmp_path / "review", tmp_path / "out"
    (name,) = kept_images(review, verdict("disc", 0.5))
    (review / name).write_bytes(encode(picture(0))[:-1])
    assert f"{name}: damaged; expected content with the SHA-256 that its name is\n" in toy.run(
        "train.review", review, out
    )
    assert found(out) == []


def test_a_line_of_an_earlier_version_counts_as_not_foreign(tmp_path: Path) -> None:
    (name,) = kept_images(tmp_path / "review", verdict("disc", 0.5))
    (tmp_path / "review" / name).with_suffix(".json").write_text('{"class": "disc", "confidence": 0.5}')
    assert sort(tmp_path / "review", tmp_path / "out").copied == [Verdict("disc", 0.5, False)]


def test_folders_that_cannot_be_sorted_are_one_clear_line(tmp_path: Path) -> None:
    missing, review = tmp_path / "missing", tmp_path / "review"
    kept_images(review, verdict("disc", 0.5))
    assert toy.run("train.review", missing, tmp_path / "out", code=1) == (
        f"error: {missing}: not a folder; expected the one that REVIEW_DIRECTORY names\n"
    )
    for out in (review, tmp_path):
        assert toy.run("train.review", review, out, code=1) == (
            f"error: {out}: {review} is in it; expected another folder for the copies\n"
        )
