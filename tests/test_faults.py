"""Internal faults: an altered model, an engine that raises, a clock that jumps, processes that were killed.

Processes under load, disks, slow clients and replicas are in tests/faults: `make check-faults`.
"""

from __future__ import annotations

import ast
import asyncio
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import requests
from numpy.typing import NDArray

from model.artifact import Outputs
from model.batching import Batcher
from model.preprocess import Pixels
from serving.access import Key
from serving.engines import LocalEngine
from serving.errors import ApiError
from serving.usage import DAY_SECONDS, Account
from tests.golden import SHIPPED_NAME
from tests.live import REPOSITORY, encode, failed_start, picture, processes, python, serve


def models(home: Path) -> Path:
    """Folder of the only version in a server's store."""
    (folder,) = (path for path in (home / "models" / SHIPPED_NAME).iterdir() if path.is_dir())
    return folder


def flip(file: Path) -> None:
    """Flip one bit in the middle of a file, in place."""
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1]))


def test_an_altered_model_does_not_affect_a_running_server_but_stops_the_next_start(tmp_path: Path) -> None:
    photograph = encode(picture(), "JPEG")

    def ask(url: str) -> object:
        sent = requests.post(f"{url}/classify", photograph, headers={"Content-Type": "image/jpeg"}, timeout=60)
        assert sent.status_code == 200
        return sent.json()["all_probabilities"]

    with serve("embedded", tmp_path, WORKERS=1) as url:
        before, started_with = ask(url), processes(tmp_path)
        for file in models(tmp_path).glob("*.onnx"):
            flip(file)
        assert ask(url) == before
        shutil.move(tmp_path / "models", tmp_path / "gone")
        assert ask(url) == before
        assert processes(tmp_path) == started_with, "none was replaced"
        shutil.move(tmp_path / "gone", tmp_path / "models")
    (line,) = failed_start(tmp_path)
    assert line.startswith(f"error: MODEL={SHIPPED_NAME!r}: ")
    assert "model.onnx: sha256 " in line


# --- the engine ---


class Fragile:
    """An engine that raises for any batch with a black image, and otherwise returns the mean of each image."""

    name = "fragile"

    def __call__(self, images: Pixels) -> Outputs:
        if not images.any(axis=(1, 2, 3)).all():
            raise RuntimeError("a black image")
        return np.asarray(images.mean(axis=(1, 2)), np.float32)

    def evidence(self, images: Pixels) -> NDArray[np.float32]:
        raise NotImplementedError


def test_an_engine_that_raises_fails_only_the_requests_of_that_batch() -> None:
    """128 sent, one of them black: its batch of 8 fails, the other 120 are answered."""
    images = np.arange(1, 129, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    images[77] = 0

    async def ask() -> list[Outputs | BaseException]:
        engine = Fragile()
        queue = Batcher(LocalEngine(engine, engine).infer, max_batch=8, max_queue=128)
        answers = await asyncio.gather(*(queue(images[i : i + 1]) for i in range(128)), return_exceptions=True)
        assert queue.waiting == 0
        np.testing.assert_array_equal(await queue(images[:1]), [[1, 1, 1]])
        return answers

    answers = asyncio.run(ask())
    failed = [i for i, answer in enumerate(answers) if isinstance(answer, BaseException)]
    assert 77 in failed
    assert len(failed) <= 8
    for i, answer in enumerate(answers):
        if i not in failed:
            np.testing.assert_array_equal(answer, images[i].mean(axis=(0, 1))[None])


# --- the clock ---

LIMITED = Key(sha256="0" * 64, images_per_second=10, images_per_day=100)
NOON = 20_000 * DAY_SECONDS + DAY_SECONDS / 2


@pytest.mark.parametrize("jump", [-DAY_SECONDS / 4, -3600.0, 3600.0, DAY_SECONDS / 4])
def test_a_clock_that_jumps_grants_at_most_one_second_of_images(jump: float) -> None:
    account = Account(tokens=10).charge(LIMITED, 10, NOON)
    with pytest.raises(ApiError, match="10 images a second"):
        account.charge(LIMITED, 10, NOON)
    if jump > 0:
        account = account.charge(LIMITED, 10, NOON + jump)
    with pytest.raises(ApiError, match="10 images a second"):
        account.charge(LIMITED, 10, NOON + jump)


WALL_CLOCK = {
    "usage.py": "days, and what several processes and restarts share",
    "review.py": "the age of files",
}


def test_durations_use_a_monotonic_clock() -> None:
    """``time.time`` is used only where the date itself is needed."""
    for file in [
        REPOSITORY / "service.py",
        *(REPOSITORY / "serving").glob("*.py"),
        *(REPOSITORY / "model").glob("*.py"),
    ]:
        used = {ast.unparse(node) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert "time.time" not in used or file.name in WALL_CLOCK, file


# --- processes that were killed ---

TWO_LIVES = """
import os, sys
from serving import metrics
metrics.QUEUE_IMAGES.set(7)
metrics.REJECTED.labels("internal").inc()
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode(), flush=True)
os._exit(0)  # as if killed
"""


def test_counters_of_dead_processes_count_and_their_gauges_do_not(tmp_path: Path) -> None:
    for lives in (1, 2):
        text = python(tmp_path, "-c", TWO_LIVES, PROMETHEUS_MULTIPROC_DIR=tmp_path).stdout
        assert "classifier_queue_images 7.0" in text
        assert f'classifier_rejected_total{{reason="internal"}} {lives}.0' in text


def test_processes_that_die_while_starting_leave_no_files_behind(tmp_path: Path) -> None:
    for _ in range(3):
        ends = "import os; from serving import metrics; os._exit(1)"
        python(tmp_path, "-c", ends, code=1, PROMETHEUS_MULTIPROC_DIR=tmp_path)
    assert len({file.stem.rpartition("_")[2] for file in tmp_path.glob("*.db")}) == 1


def test_metrics_reserve_their_disk_space(tmp_path: Path) -> None:
    python(tmp_path, "-c", TWO_LIVES, PROMETHEUS_MULTIPROC_DIR=tmp_path)
    files = list(tmp_path.glob("*.db"))
    assert len(files) == 5
    for file in files:
        assert file.stat().st_blocks * 512 >= file.stat().st_size == 2**17
