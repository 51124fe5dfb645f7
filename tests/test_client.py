"""The command line against the real server, with ``--local``, and against a server in trouble."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import requests
from PIL import Image

from client.__main__ import _results
from client.errors import ClientError
from client.images import SUFFIXES
from client.journal import beside
from client.remote import API_KEY
from model.artifact import Artifact
from model.headers import FORMATS
from serving import access
from tests import toy
from tests.live import Server, encode, environment, free_port, picture, python, samples, serve, store_model, total
from tests.snippets import of_the_example

PICTURES = 200
BROKEN = {
    "broken/cut.png": (encode(picture())[:60], "invalid_image"),
    "broken/empty.jpg": (b"", "invalid_image"),
    "broken/text.png": (b"no image at all", "unsupported_media_type"),
}
NUMBERS = {"confidence", "probabilities"}
"""Columns whose last digit depends on the batch."""
VERDICT = {
    "predicted_class": 1,
    "class_name": "frame",
    "confidence": 0.5,
    "all_probabilities": {"0": 0.3, "1": 0.5, "2": 0.2},
    "in_distribution": True,
    "model": "fake:1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for name, content in [*((f"{i:03}.png", encode(picture(i))) for i in range(PICTURES)), *broken_files()]:
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    (root / "notes.txt").write_text("not an image, and not meant to be one")
    return root


def broken_files() -> Iterator[tuple[str, bytes]]:
    return ((name, content) for name, (content, _) in BROKEN.items())


def begin(*arguments: object, home: Path | None = None, **variables: str) -> subprocess.Popen[str]:
    env = {**environment(home or Path("/nonexistent")), **variables}
    command = [sys.executable, "-m", "client", *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=toy.ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with this signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(*arguments: object, code: int = 0, **variables: Any) -> str:
    """Run the command, check its exit status, and return its output including errors."""
    process = begin(*arguments, **variables)
    shown, errors = process.communicate(timeout=300)
    assert process.returncode == code, shown + errors
    return shown + errors


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def paths(folder: Path) -> list[str]:
    """In the order in which a folder is walked: its own files first, then those of its subfolders."""
    return [str(folder / f"{i:03}.png") for i in range(PICTURES)] + [str(folder / name) for name in BROKEN]


class Trouble(ThreadingHTTPServer):
    """Answers each request as the next entry of ``script`` says, and later ones with verdicts, after ``seconds``."""

    daemon_threads = True

    def __init__(self, script: list[Any], seconds: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.script, self.seconds = script, seconds
        self.asked: list[float] = []
        self.images = 0
        self.lock = threading.Lock()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Trouble

    def do_POST(self) -> None:
        images = self.rfile.read(int(self.headers["Content-Length"])).count(b'name="images"')
        with self.server.lock:
            self.server.asked.append(time.monotonic())
            status, headers, *said = self.server.script.pop(0)() if self.server.script else (200, {})
            seconds = self.server.seconds
        time.sleep(seconds)
        if status is None:
            self.close_connection = True
            return
        problem = {"error": {"code": "trouble", "message": f"trouble {status}"}}
        with self.server.lock:
            self.server.images += images if status == 200 else 0
        usual = {"results": [VERDICT] * images} if status == 200 else problem
        self.reply(status, said[0] if said else usual, headers)

    def reply(self, status: int, document: Any, headers: dict[str, str]) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 # the library's name
        pass


def answer(status: int | None, retry_after: str | None = None) -> Callable[[], tuple[int | None, dict[str, str]]]:
    """An entry of a script; without a status the connection is closed."""
    return lambda: (status, {"Retry-After": retry_after} if retry_after else {})


def saying(status: int, document: Any) -> Callable[[], tuple[int, dict[str, str], Any]]:
    return lambda: (status, {}, document)


def taking(server: Trouble, seconds: float, status: int) -> Callable[[], tuple[int, dict[str, str]]]:
    """An entry of a script: from now on, requests take ``seconds``."""

    def taken() -> tuple[int, dict[str, str]]:
        server.seconds = seconds
        return status, {}

    return taken


def in_three_seconds() -> tuple[int, dict[str, str]]:
    return 503, {"Retry-After": formatdate(time.time() + 3, usegmt=True)}


@contextmanager
def trouble(*script: Any, seconds: float = 0.0) -> Iterator[tuple[Trouble, str]]:
    with Trouble(list(script), seconds) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_folder_yields_every_file_of_a_known_format() -> None:
    assert {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS} == SUFFIXES


class TestRows:
    def test_every_image_has_a_row_in_order(self, embedded: Server, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.jsonl"
        shown = run(folder, "--url", embedded.url, "--out", out, "--prediction-set", 0.99, "--probabilities", code=1)
        assert "203 images, 3 of them not classified" in shown
        rows = read_jsonl(out)
        assert [row["path"] for row in rows] == paths(folder)
        assert [row["error_code"] for row in rows] == [None] * PICTURES + [code for _, code in BROKEN.values()]
        assert list(tmp_path.iterdir()) == [out]
        for row in rows[:PICTURES:50]:
            reply = requests.post(
                f"{embedded.url}/classify",
                params={"prediction_set": 0.99},
                files={"image": Path(row["path"]).read_bytes()},
                timeout=60,
            ).json()
            for column in ("predicted_class", "class_name", "in_distribution", "prediction_set", "model"):
                assert row[column] == reply[column]
            assert row["probabilities"] == pytest.approx(list(reply["all_probabilities"].values()), abs=1e-4)
            assert row["confidence"] == max(row["probabilities"])

    def test_all_formats_hold_the_same_rows(self, embedded: Server, folder: Path, tmp_path: Path) -> None:
        options = ("--url", embedded.url, "--prediction-set", 0.9, "--probabilities", "--batch", 16, "--in-flight", 2)
        for suffix in ("jsonl", "csv", "parquet"):
            run(folder, *options, "--out", tmp_path / f"out.{suffix}", code=1)
        rows = read_jsonl(tmp_path / "out.jsonl")
        with (tmp_path / "out.csv").open(newline="") as file:
            told = list(csv.DictReader(file))
        assert list(told[0]) == list(rows[0])
        for row, cells in zip(rows, told, strict=True):
            assert cells["path"] == row["path"]
            assert cells["error_code"] == (row["error_code"] or "")
            assert cells["in_distribution"] == ("" if row["error_code"] else json.dumps(row["in_distribution"]))
            assert row["error_code"] or json.loads(cells["prediction_set"]) == row["prediction_set"]
        # A batch of another size may round the last digit differently.
        for row, other in zip(rows, pq.read_table(tmp_path / "out.parquet").to_pylist(), strict=True):
            assert row.keys() == other.keys()
            for column in row:
                assert other[column] == (pytest.approx(row[column], abs=1e-4) if column in NUMBERS else row[column])

    def test_local_classification_agrees_with_the_service(self, embedded: Server, folder: Path, tmp_path: Path) -> None:
        wanted = (folder, "--prediction-set", 0.99, "--probabilities")
        run(*wanted, "--url", embedded.url, "--out", tmp_path / "service.jsonl", code=1)
        run(*wanted, "--local", "--out", tmp_path / "local.jsonl", code=1, home=embedded.home, RUNTIME="onnx-int8")
        for row, other in zip(
            read_jsonl(tmp_path / "service.jsonl"), read_jsonl(tmp_path / "local.jsonl"), strict=True
        ):
            for column in row:
                assert other[column] == (pytest.approx(row[column], abs=1e-4) if column in NUMBERS else row[column])

    def test_a_table_is_printed_for_people(self, embedded: Server, folder: Path) -> None:
        shown = run(folder / "00[01].png", folder / "broken", folder / "000.png", "--url", embedded.url, code=1)
        header, *lines = shown.splitlines()[:-1]
        assert header.split() == ["path", "class_name", "confidence", "in_distribution", "error"]
        assert [line.split()[0] for line in lines] == [str(folder / name) for name in ("000.png", "001.png", *BROKEN)]
        assert "unsupported_media_type: not an image of a known format" in lines[-1]

    def test_the_exit_status_is_0_if_every_image_was_classified(self, embedded: Server, folder: Path) -> None:
        assert "1 images, 0 of them not classified" in run(folder / "000.png", "--url", embedded.url)

    def test_an_unreadable_file_is_a_row(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "gone.png").symlink_to("nowhere")
        (tmp_path / os.fsdecode(b"images/\xff.png")).write_bytes(encode(picture()))
        with (tmp_path / "images" / "huge.png").open("wb") as file:
            file.truncate(64 * 2**20 + 1)
        with trouble() as (_, url):
            run(tmp_path / "images", "--url", url, "--out", tmp_path / "out.csv", code=1)
        with (tmp_path / "out.csv").open(newline="") as file:
            told = {Path(row["path"]).name: row for row in csv.DictReader(file)}
        assert told["gone.png"]["error_code"] == "unreadable"
        assert told["huge.png"]["error_code"] == "too_large"
        assert told["\\xff.png"]["class_name"] == "frame"

    def test_a_path_that_is_no_regular_file_is_a_row_and_does_not_block(self, tmp_path: Path) -> None:
        images = tmp_path / "images"
        (images / "folder.png").mkdir(parents=True)
        (images / "folder.png" / "inside.png").write_bytes(encode(picture()))
        os.mkfifo(images / "pipe.png")
        (images / "endless.png").symlink_to("/dev/zero")
        (images / "itself.png").symlink_to("itself.png")
        with socket.socket(socket.AF_UNIX) as listener, trouble() as (_, url):
            listener.bind(str(images / "socket.png"))
            run(images, images / "pipe.png", "--url", url, "--out", tmp_path / "out.jsonl", code=1)
        told = {Path(row["path"]).name: row["error_message"] for row in read_jsonl(tmp_path / "out.jsonl")}
        assert told.pop("inside.png") is None
        assert told.pop("itself.png") == "Too many levels of symbolic links"
        refused = "a pipe, a socket or a device; expected a file"
        assert told == dict.fromkeys(("endless.png", "pipe.png", "socket.png"), refused)

    def test_links_to_folders_are_followed_without_loops(self, tmp_path: Path) -> None:
        """With glob's own ``**``, two links that lead back would yield 2 to the power of 40 paths."""
        root, other = tmp_path / "root", tmp_path / "other"
        for file in (root / "a" / "1.png", root / "b" / "2.png", root / ".hidden" / "4.png", other / "3.png"):
            file.parent.mkdir(parents=True)
            file.write_bytes(encode(picture()))
        links = {root / "a" / "to": root / "b", root / "b" / "to": root / "a", root / "away": other}
        back = {root / "a" / "back": root, root / "b" / "back": root, other / "back": root, root / "above": tmp_path}
        for link, target in {**links, **back, root / "disk": Path("/")}.items():
            link.symlink_to(target)
        shown = ["a/1.png", "b/2.png", "away/3.png"]
        wanted = {
            root: [".hidden/4.png", *shown],
            root / "**" / "*.png": sorted(shown),
            root / "**" / "a" / "**": ["a/1.png", "a/to/2.png"],
        }
        with trouble() as (_, url):
            for number, (argument, names) in enumerate(wanted.items()):
                run(argument, "--url", url, "--out", tmp_path / f"{number}.jsonl")
                rows = read_jsonl(tmp_path / f"{number}.jsonl")
                assert [row["path"] for row in rows] == [str(root / name) for name in names]

    def test_names_are_printed_in_any_encoding(self, tmp_path: Path) -> None:
        images = tmp_path / "images"
        images.mkdir()
        for name in (b"1\xff.png", "2\u00e9.png".encode(), b"3\n\x1b[7m.png"):
            (images / os.fsdecode(name)).write_bytes(encode(picture()))
        with trouble() as (_, url):
            for encoding, name in (("ascii", r"2\xe9.png"), ("utf-8", "2\u00e9.png")):
                shown = run(images, "--url", url, PYTHONIOENCODING=encoding)
                told = [Path(line.split()[0]).name for line in shown.splitlines()[1:-1]]
                assert told == [r"1\xff.png", name, r"3\n\x1b[7m.png"]

    def test_an_output_may_have_any_name(self, folder: Path, tmp_path: Path) -> None:
        with trouble() as (_, url):
            for suffix in (b".csv", b".jsonl", b".parquet"):
                out = tmp_path / os.fsdecode(b"\xff" + suffix)
                run(folder / "000.png", "--url", url, "--out", out)
                assert out.exists()

    def test_a_batch_that_is_too_large_is_halved(self, embedded: Server, folder: Path, tmp_path: Path) -> None:
        """The server takes at most 64 images per request and 1 MB per image."""
        images = tmp_path / "images"
        images.mkdir()
        (images / "large.bmp").write_bytes(encode(picture(0, 900, 900), "BMP"))
        out = tmp_path / "out.jsonl"
        run(folder, images, "--url", embedded.url, "--batch", 200, "--out", out, code=1)
        rows = read_jsonl(out)
        assert [row["path"] for row in rows] == [*paths(folder), str(images / "large.bmp")]
        assert rows[-1]["error_code"] == "too_large"
        assert sum(row["error_code"] is None for row in rows) == PICTURES


class TestTrouble:
    def test_retry_after_is_honoured(self, folder: Path) -> None:
        with trouble(answer(429, "2")) as (server, url):
            assert "trouble 429; trying again" in run(folder / "000.png", "--url", url)
            first, second = server.asked
        assert 2 <= second - first < 20

    def test_retry_after_may_be_a_date(self, folder: Path) -> None:
        with trouble(in_three_seconds) as (server, url):
            run(folder / "000.png", "--url", url)
            first, second = server.asked
        assert 1 <= second - first < 20

    def test_lost_connections_and_failures_are_retried(self, folder: Path, tmp_path: Path) -> None:
        well, lost, failed = answer(200), answer(None), answer(503)
        with trouble(well, lost, failed, lost, failed) as (server, url):
            run(folder / "0*.png", "--url", url, "--batch", 10, "--out", tmp_path / "out.jsonl")
            assert server.images == 100
        assert [row["class_name"] for row in read_jsonl(tmp_path / "out.jsonl")] == ["frame"] * 100

    def test_a_batch_that_times_out_is_halved(self, folder: Path) -> None:
        with trouble(answer(504)) as (server, url):
            run(folder / "00?.png", "--url", url, "--batch", 10)
            assert len(server.asked) == 3
        with trouble(answer(504)) as (server, url):  # a single image cannot be halved
            assert "trouble 504; trying again" in run(folder / "000.png", "--url", url)

    def test_an_image_that_always_times_out_is_a_row_and_does_not_end_the_run(
        self, folder: Path, tmp_path: Path
    ) -> None:
        """One of four: its batch is halved twice, then the image alone is tried three times."""
        late = answer(504)
        with trouble(late, answer(200), late, *[late] * 3) as (server, url):
            out = tmp_path / "out.jsonl"
            run(folder / "00[0-3].png", "--url", url, "--batch", 4, "--in-flight", 1, "--out", out, code=1)
            assert len(server.asked) == 7
        assert [row["error_code"] for row in read_jsonl(out)] == [None, None, "trouble", None]

    def test_a_nonstandard_status_is_reported(self, folder: Path) -> None:
        with trouble(saying(524, "a page of Cloudflare's")) as (_, url):
            shown = run(folder / "000.png", "--url", url, "--patience", 0, code=2)
        assert "error: " + url + ": HTTP status 524; given up" in shown

    @pytest.mark.parametrize(
        ("status", "document", "message"),
        [
            (200, [], "the reply is not an object"),
            (200, {"results": None}, "expected 1 results in the reply: is this the classifier?"),
            (200, {"results": []}, "expected 1 results in the reply: is this the classifier?"),
            (200, {"results": [None]}, "expected 1 results in the reply: is this the classifier?"),
            (401, {"error": {"code": 16, "message": None}}, "401 16: None"),
        ],
    )
    def test_a_malformed_reply_is_one_line(self, folder: Path, status: int, document: Any, message: str) -> None:
        with trouble(saying(status, document)) as (_, url):
            shown = run(folder / "000.png", "--url", url, code=2)
        assert f"error: {url}: {message}" in shown
        assert "Traceback" not in shown

    def test_an_error_in_another_format_is_a_row(self, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.parquet"
        with trouble(saying(413, {"error": {"code": 413, "message": "too much"}})) as (_, url):
            run(folder / "000.png", "--url", url, "--out", out, code=1)
        assert pq.read_table(out).to_pylist()[0]["error_code"] == "413"

    def test_a_reply_that_cannot_be_decoded_is_requested_again(self, folder: Path) -> None:
        with trouble(lambda: (200, {"Content-Encoding": "gzip"})) as (server, url):
            assert "; trying again" in run(folder / "000.png", "--url", url)
            assert len(server.asked) == 2

    @pytest.mark.parametrize("told", ["0", formatdate(0, usegmt=True)], ids=["0", "a time that is over"])
    def test_a_retry_after_of_zero_does_not_cause_a_busy_loop(self, folder: Path, told: str) -> None:
        with trouble(*[answer(503, told)] * 1000) as (server, url):
            run(folder / "000.png", "--url", url, "--patience", 2, code=2)
            assert 2 <= len(server.asked) <= 6

    def test_patience_ends_and_results_are_kept(self, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.csv"
        options = (folder / "0*.png", "--batch", 10, "--in-flight", 1, "--out", out)
        with trouble(answer(200), *[answer(503, "1")] * 50) as (_, url):
            shown = run(*options, "--url", url, "--patience", 2, code=2)
        assert "trouble 503; given up" in shown
        assert "--resume goes on" in shown
        assert not out.exists()
        assert "of a run that did not end: expected --resume" in run(*options, "--url", url, code=2)
        with trouble() as (server, url):
            run(*options, "--url", url, "--resume")
            assert server.images == 90

    def test_a_kill_loses_at_most_what_was_in_flight(self, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.parquet"
        options = (folder / "*.png", "--batch", 4, "--in-flight", 2, "--out", out)
        with trouble(seconds=0.2) as (server, url):
            process = begin(*options, "--url", url)
            while server.images < 40:
                time.sleep(0.01)
                assert process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kept = beside(out).read_bytes()
            sent = server.images
            beside(out).write_bytes(kept + b'{"path": "cut sho')
            server.seconds = 0
            run(*options, "--url", url, "--resume")
            again = server.images - PICTURES
        assert 40 <= sent < PICTURES
        assert 0 <= again <= 4 * 2 * 2  # in flight, or answered while earlier ones were being written
        rows = pq.read_table(out).to_pylist()
        assert [row["path"] for row in rows] == paths(folder)[:PICTURES]
        assert not beside(out).exists()

    def test_an_interrupt_ends_the_run_at_once_and_explains_how_to_resume(self, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.jsonl"
        options = (folder / "*.png", "--batch", 4, "--out", out)
        with trouble(seconds=0.2) as (server, url):
            process = begin(*options, "--url", url)
            while server.images < 20:
                time.sleep(0.01)
            server.seconds = 50  # longer than anyone would wait
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=10)
            assert process.returncode == 130, errors
            assert errors == "interrupted; --resume goes on from what has been answered\n"
            kept = len(beside(out).read_bytes().splitlines()) - 1
            assert 20 <= kept <= server.images
            server.seconds, server.images = 0, 0
            run(*options, "--url", url, "--resume")
            assert server.images == PICTURES - kept
        assert [row["path"] for row in read_jsonl(out)] == paths(folder)[:PICTURES]

    def test_results_that_arrive_beside_a_failure_are_kept(self) -> None:
        failed, answered, later, waiting = (Future[list[Any]]() for _ in range(4))
        failed.set_exception(ClientError("401"))
        answered.set_result(["answered"])
        later.set_running_or_notify_cancel()
        threading.Timer(0.1, later.set_result, (["later"],)).start()
        results = _results([failed, answered], [later, waiting])
        assert [next(results), next(results)] == [["answered"], ["later"]]
        assert waiting.cancelled()
        with pytest.raises(ClientError):
            next(results)

    def test_an_error_does_not_wait_for_other_requests(self, folder: Path) -> None:
        with trouble() as (server, url):
            server.script = [*[taking(server, 50, 200)] * 3, taking(server, 0, 401)]
            process = begin(folder / "*.png", "--batch", 4, "--in-flight", 4, "--url", url)
            _, errors = process.communicate(timeout=20)
        assert process.returncode == 2, errors
        assert "401 trouble" in errors

    def test_a_journal_with_other_columns_is_refused(self, folder: Path, tmp_path: Path) -> None:
        options = (folder / "00*.png", "--out", tmp_path / "out.csv", "--batch", 1, "--in-flight", 1, "--patience", 0)
        with trouble(answer(200), answer(503)) as (_, url):
            run(*options, "--url", url, code=2)
            assert "was begun with" in run(*options, "--url", url, "--probabilities", "--resume", code=2)
            beside(tmp_path / "out.csv").write_text("something else\n")
            assert "is no journal of this command" in run(*options, "--url", url, "--resume", code=2)

    def test_two_runs_with_the_same_output_are_refused(self, folder: Path, tmp_path: Path) -> None:
        options = (folder / "000.png", "--out", tmp_path / "out.csv")
        with trouble(seconds=20) as (server, url):
            first = begin(*options, "--url", url)
            while not server.asked:
                time.sleep(0.01)
            assert "another process is writing it" in run(*options, "--url", url, "--resume", code=2)
            first.kill()
            first.communicate()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A server with one worker, a queue that one batch fills, and a key that only allows classifying batches."""
    home = tmp_path_factory.mktemp("guarded")
    key = access.add(home / "keys.toml", "batches", paths=["/classify/batch"])
    small = {"WORKERS": 1, "MAX_QUEUE": 32, "MAX_REQUEST_IMAGES": 32}
    with serve("embedded", home, API_KEYS=home / "keys.toml", **small) as url:
        yield url, key


class TestKeysAndOverload:
    @of_the_example
    def test_the_client_waits_out_overload(self, guarded: tuple[str, str], folder: Path, tmp_path: Path) -> None:
        url, key = guarded
        options = ("--url", url, "--batch", 32, "--in-flight", 8, "--out", tmp_path / "out.jsonl")
        run(folder, *options, code=1, **{API_KEY: key})
        rows = read_jsonl(tmp_path / "out.jsonl")
        assert sum(row["error_code"] is None for row in rows) == PICTURES
        assert total(samples(url), "classifier_rejected_total", reason="overloaded") > 0

    def test_a_missing_or_wrong_key_is_reported(self, guarded: tuple[str, str], folder: Path, tmp_path: Path) -> None:
        url, key = guarded
        for variables in ({}, {API_KEY: key[:-1]}):
            shown = run(folder, "--url", url, "--out", tmp_path / "out.csv", code=2, **variables)
            assert "401 unauthorized" in shown
            assert API_KEY in shown
            assert not list(tmp_path.iterdir())

    def test_a_malformed_key_is_one_line_that_does_not_show_it(self, folder: Path) -> None:
        shown = run(folder, code=2, **{API_KEY: "pass\u00e9"})
        assert f"error: {API_KEY}: has characters that no key has" in shown
        assert "pass" not in shown


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nothing/*.png"], "nothing/*.png: expected a file, a folder of images, or a pattern that some match"),
            (["README.md", "--out", "x.txt"], "x.txt: expected a name that ends in one of .csv, .jsonl, .parquet"),
            (["README.md", "--out", "nowhere/x.csv"], "there is no folder nowhere"),
            (["README.md", "--url", "ftp://x"], "unsupported protocol"),
            (["README.md", "--url", "http://a..b"], "error: http://a..b: "),
            (["README.md", "--url", "http://a/\udcff"], "error: http://a/\\udcff: "),
            (["README.md", "--resume"], "--resume needs --out"),
            (["README.md", "--prediction-set", "2"], "expected a number between 0 and 1"),
            (["README.md", "--batch", "0"], "expected a whole number above 0"),
            (["README.md", "--url", f"http://127.0.0.1:{free_port()}"], "Connection refused"),
            (["README.md", "--cacert", "LICENSE"], "LICENSE: "),
            (["README.md", "--local", "nope"], "'nope' is not in the model store"),
        ],
    )
    def test_one_line_says_what_is_wrong(self, arguments: list[str], message: str, tmp_path: Path) -> None:
        shown = run(*arguments, code=2, home=tmp_path)
        assert message in shown
        assert "Traceback" not in shown

    def test_a_proxy_that_cannot_be_used_is_one_line(self) -> None:
        shown = run("README.md", code=2, ALL_PROXY="socks5://127.0.0.1:9")
        assert shown.startswith("error: Using SOCKS proxy")
        assert shown.endswith("expected an HTTP proxy in ALL_PROXY and the like, or NO_PROXY=*\n")

    def test_an_address_that_is_not_the_classifiers_is_reported(self, embedded: Server) -> None:
        assert "404 not_found" in run("README.md", "--url", f"{embedded.url}/elsewhere", code=2)

    def test_an_unreadable_folder_is_an_error_and_not_empty(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Unreadable because its path is too long: permissions would not stop root."""
        (tmp_path / "seen.png").write_bytes(encode(picture()))
        monkeypatch.chdir(tmp_path)
        for _ in range(17):
            Path("x" * 255).mkdir()
            os.chdir("x" * 255)
        with trouble() as (_, url):
            shown = run(tmp_path, "--url", url, code=2)
        assert "error: [Errno 36] File name too long" in shown
        assert "Traceback" not in shown

    def test_files_with_the_same_name_in_the_output_are_refused(self, tmp_path: Path) -> None:
        for name in (b"\xff.png", b"\\xff.png"):
            (tmp_path / os.fsdecode(name)).write_bytes(encode(picture()))
        with trouble() as (_, url):
            assert f"{tmp_path}/\\xff.png: expected one file" in run(tmp_path, "--url", url, code=2)

    def test_an_output_is_never_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "out.csv").write_text("precious")
        assert "is there already" in run("README.md", "--out", tmp_path / "out.csv", "--resume", code=2)
        assert (tmp_path / "out.csv").read_text() == "precious"

    def test_parquet_without_its_package_is_one_line(self, tmp_path: Path) -> None:
        code = "import sys, runpy; sys.modules['pyarrow'] = None; runpy.run_module('client', run_name='__main__')"
        done = python(tmp_path, "-c", code, "README.md", "--out", tmp_path / "x.parquet", code=2)
        assert "Parquet needs the package pyarrow" in done.stderr


def test_a_model_is_chosen_by_name(toy_artifact: Artifact, toy_folder: Path, tmp_path: Path) -> None:
    store_model(tmp_path, toy_artifact.path)
    run(toy_folder, "--local", "toy", "--out", tmp_path / "out.jsonl", home=tmp_path, code=1)
    again = tmp_path / "again.jsonl"
    run(toy_folder, "--local", "toy", "--out", again, home=tmp_path, code=1, RUNTIME="fastest")
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert [row["class_name"] for row in read_jsonl(again)] == [row["class_name"] for row in rows]
    assert {row["model"] for row in rows} == {None, f"toy:{toy_artifact.version}"}
    right = sum(Path(row["path"]).parent.name == row["class_name"] for row in rows)
    assert right >= 0.9 * len(rows)
