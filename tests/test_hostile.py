"""Thousands of hostile requests to a real server: each is refused as documented, and the server stays healthy."""

from __future__ import annotations

import http.client
import re
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest
from PIL import Image

from model.decoder import memory_for
from model.preprocess import MAX_PIXELS
from tests import hostile, seeds
from tests.live import LOG, Server, encode, picture, processes, samples, serve, total

TIMEOUT = 60
THREADS = 8
MAX_BYTES = 600 * 10**6
"""Maximum peak memory of a worker."""
LIBRARIES = 64 * 2**20
"""Allowance for a decoder's libraries, on top of the data that its memory limit covers."""
DOCUMENTED = {
    "invalid_request": 400,
    "invalid_image": 400,
    "too_large": 413,
    "too_many_pixels": 413,
    "unsupported_media_type": 415,
}
JPEG = encode(picture(5, 64, 64), "JPEG")


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One worker with default limits, whose memory is measured."""
    home = tmp_path_factory.mktemp("hostile")
    with serve("embedded", home, WORKERS=1) as url:
        yield Server(url, "embedded", home)


def connect(server: Server) -> closing[http.client.HTTPConnection]:
    return closing(http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=TIMEOUT))


def ask(connection: http.client.HTTPConnection, path: str, content_type: str, body: bytes) -> Answer:
    connection.request("POST", path, body, {"Content-Type": content_type.encode("latin-1")})
    response = connection.getresponse()
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def ask_all(server: Server, requests: list[hostile.Hostile]) -> list[Answer]:
    """Send ``requests`` in parallel over persistent connections."""

    def share(start: int) -> list[Answer]:
        with connect(server) as connection:
            return [ask(connection, *request) for request in requests[start::THREADS]]

    with ThreadPoolExecutor(THREADS) as pool:
        shares = list(pool.map(share, range(THREADS)))
    return [shares[i % THREADS][i // THREADS] for i in range(len(requests))]


def classify(server: Server, data: bytes = JPEG) -> Answer:
    with connect(server) as connection:
        return ask(connection, "/classify", "image/jpeg", data)


def status_of(pid: int) -> dict[str, int]:
    """The figures of ``/proc/<pid>/status``, in bytes."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return {name: 1024 * int(size) for name, size in found}


def members(server: Server, program: str) -> list[int]:
    return [pid for pid in processes(server.home) if program.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]


def worker(server: Server) -> int:
    (pid,) = members(server, "_bentoml_impl.worker.service")
    return pid


def assert_sound(server: Server, pid: int, answer: Answer) -> None:
    """The same worker is running, within its memory limit, and gives the same answer as before."""
    assert worker(server) == pid
    assert status_of(pid)["VmHWM"] <= MAX_BYTES
    again = classify(server)
    assert again.status == 200
    assert without_id(again) == without_id(answer)


def not_json(server: Server) -> list[str]:
    """Lines of the log that no log collector could parse."""
    return [line for line in (server.home / LOG).read_text().splitlines() if not line.startswith("{")]


def without_id(answer: Answer) -> dict[str, Any]:
    document = orjson.loads(answer.body)
    document.pop("request_id")
    return document


def assert_documented(request: object, answer: Answer) -> str:
    """Check for a prediction, or a well-formed error with its documented status; returns the error's code."""
    if answer.status == 200:
        return ""
    error = orjson.loads(answer.body)["error"]
    assert set(error) == {"code", "message", "request_id"}
    assert error["message"]
    assert " at 0x" not in error["message"]
    assert DOCUMENTED.get(error["code"]) == answer.status, (request, answer)
    assert answer.headers["x-error-code"] == error["code"]
    assert answer.headers["x-request-id"] == error["request_id"]
    assert answer.headers["content-type"] == "application/json"
    return str(error["code"])


def test_thousands_of_bad_requests_are_refused_and_harm_nothing(server: Server) -> None:
    requests = hostile.requests()
    before, printed = classify(server), not_json(server)
    pid = worker(server)
    answers = ask_all(server, requests)
    codes = Counter(map(assert_documented, requests, answers))
    assert codes.total() - codes[""] >= 2000, codes
    assert set(codes) - {""} == set(DOCUMENTED)
    assert_sound(server, pid, before)
    assert not_json(server) == printed  # otherwise decoders that print would let anyone fill the log
    figures = samples(server.url)
    assert total(figures, "classifier_rejected_total", reason="internal") == 0
    assert total(figures, "classifier_decoder_deaths_total") == 0


def largest() -> list[bytes]:
    """Small files with nearly 50 million pixels, one of each kind whose decoder uses memory differently."""
    side = 7_000
    gray, colour = Image.new("L", (side, side), 99), Image.new("RGB", (side, side), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        encode(gray.convert("1")),
        encode(colour, exif=exif, compress_level=1),
        encode(gray, "GIF"),
        encode(colour, "JPEG", progressive=True, subsampling=0),
        encode(colour, "TIFF", compression="tiff_lzw"),
        encode(Image.new("RGBA", (side // 2, side // 2), "red"), compress_level=1),
        encode(Image.new("RGBA", (side // 2, side // 2), "red"), "TIFF", compression="tiff_lzw"),
    ]


def test_the_largest_images_and_bodies_together_stay_within_the_memory_limit(server: Server) -> None:
    """Some are told to come back later, or time out on a slow machine."""
    before, pid = classify(server), worker(server)
    images = [hostile.Hostile("/classify", "image/png", image) for image in largest()]
    junk = [hostile.Hostile("/classify", "image/png", b"x" * 16 * 2**20)] * 4
    form = b'--seam\r\nContent-Disposition: form-data; name="images"\r\n\r\n' + b"x" * 15 * 2**20 + b"\r\n"
    junk += [hostile.Hostile("/classify/batch", seeds.FORM, form * 2 + b"--seam--\r\n")] * 4
    junk += [hostile.Hostile("/classify/batch", seeds.JSON, b'{"images": ["' + b"A" * 20 * 2**20 + b'"]}')] * 4
    statuses = Counter(answer.status for answer in ask_all(server, [*images, *junk, *images]))
    assert set(statuses) <= {200, 400, 413, 415, 429, 504}, statuses
    assert_sound(server, pid, before)
    peaks = [status_of(decoder)["VmHWM"] for decoder in members(server, "model.decoder")]
    assert peaks
    assert max(peaks) <= memory_for(MAX_PIXELS) + LIBRARIES


RAW = {
    "no length": (b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n\r\n", 400),
    "a length that is none": (b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n", 400),
    "a negative length": (b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
    "two lengths": (b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", 400),
    "a length and chunks": (
        b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    "chunks of no size": (b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    "no method of HTTP": (b"BREW /classify HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "a NUL in a header": (b"GET /model HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n", 400),
    "a folded header": (b"POST /classify HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\nContent-Length: 0\r\n\r\n", 400),
    "a path of no text": (b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a path with NUL": (b"GET /model%00 HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "a path that climbs": (b"GET /model/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "a whole URL": (b"GET http://elsewhere/x HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "another method": (b"TRACE /classify HTTP/1.1\r\nHost: x\r\n\r\n", 405),
    "a deadline that is none": (
        b"POST /classify HTTP/1.1\r\nHost: x\r\nX-Request-Timeout: nan\r\nContent-Length: 0\r\n\r\n",
        400,
    ),
    "an encoding": (b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Encoding: zstd\r\nContent-Length: 0\r\n\r\n", 415),
}


@pytest.mark.parametrize("name", RAW)
def test_malformed_http_is_refused(server: Server, name: str) -> None:
    sent, status = RAW[name]
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), TIMEOUT) as connection:
        connection.sendall(sent)
        response = http.client.HTTPResponse(connection)
        response.begin()
        body = response.read()
    assert response.status == status, body
    assert orjson.loads(body)["error"]["code"]
    assert classify(server).status == 200


def test_unknown_paths_and_methods_leave_no_trace_in_the_metrics(server: Server) -> None:
    def labels() -> set[str]:
        return {
            label for series in samples(server.url) for label in re.findall(r'(?:endpoint|method|path)="[^"]*"', series)
        }

    with connect(server) as connection:
        for path in ("/classify", "/nowhere"):  # the labels that may exist
            ask(connection, path, "image/jpeg", JPEG)
        before = labels()
        for i in range(300):
            connection.request("GET", f"/{i}/{'x' * i}?{i}=y", headers={f"X-{i}": "x"})
            assert connection.getresponse().read()
            connection.request(("PUT", "DELETE", "PROPFIND", "PURGE")[i % 4], "/model")
            assert connection.getresponse().read()
    assert {label for label in labels() if "/model" not in label} <= before
