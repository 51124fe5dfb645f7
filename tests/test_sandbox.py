"""Decoding in a process of its own gives the same pixels, and survives images that kill their decoder."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import requests
from PIL import ExifTags, Image
from starlette.requests import Request
from starlette.types import Message

from model import runtimes
from model.artifact import ONNX_INT8, Artifact
from model.batching import Batcher, GoneError, QueueFullError
from model.classifier import Classifier, Scores
from model.decoder import BASE_MEMORY, memory_for
from model.headers import FORMATS, ImageError, UnsupportedFormatError, read_header
from model.preprocess import ALPHA_COST, MAX_PIXELS, Pixels, inspect, preprocess, shrink
from model.sandbox import DecoderError, Sandbox
from model.store import SHIPPED
from serving import accounting, metrics
from serving.context import request_id, watch
from serving.drift import Drift
from serving.logs import add_request_id
from serving.pipeline import LARGE_BYTES, Pipeline, is_decoded_here
from serving.replies import Replies
from settings import Settings
from tests.asgi import request
from tests.faulty_decoder import FAULTS, SLEEP, WALL_SECONDS
from tests.live import Server, encode, family, picture, processes

SIZE = (32, 32)
FAULTY = (sys.executable, "-m", "tests.faulty_decoder")
WEBP = encode(picture(), "WEBP")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with closing(Sandbox()) as real:
        yield real


@pytest.fixture(scope="module")
def faulty() -> Iterator[Sandbox]:
    with closing(Sandbox(command=FAULTY)) as sandbox:
        yield sandbox


@pytest.mark.parametrize("kind", FORMATS)
def test_pixels_are_the_same_as_without_the_sandbox(sandbox: Sandbox, kind: str) -> None:
    data = encode(picture(1, 300, 200), kind)
    np.testing.assert_array_equal(sandbox.render(data, SIZE), preprocess(data, SIZE))
    np.testing.assert_array_equal(sandbox.shrink(data, 100), shrink(data, read_header(data), 100))


def test_a_shrunk_image_keeps_its_proportions(sandbox: Sandbox) -> None:
    assert sandbox.shrink(encode(picture(1, 300, 200)), 100).shape == (100, 67, 3)
    assert sandbox.shrink(encode(picture(1, 30, 20)), 100).shape == (30, 20, 3)
    assert sandbox.shrink(encode(picture(1, 2, 4000)), 100).shape == (1, 100, 3)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", ImageError),
        (WEBP[: len(WEBP) // 2], ImageError),
        (b"hello, world", UnsupportedFormatError),
    ],
)
def test_errors_are_the_same_as_without_the_sandbox(sandbox: Sandbox, data: bytes, error: type[ImageError]) -> None:
    with pytest.raises(ImageError) as contained:
        sandbox.render(data, SIZE)
    with pytest.raises(ImageError) as bare:
        preprocess(data, SIZE)
    assert type(contained.value) is type(bare.value) is error
    assert str(contained.value) == str(bare.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_image_is_an_error_and_the_next_one_is_decoded(faulty: Sandbox, fault: bytes) -> None:
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(DecoderError):
            faulty.render(WEBP + fault, SIZE)
        assert time.monotonic() - started < WALL_SECONDS + 5
        np.testing.assert_array_equal(faulty.render(WEBP, SIZE), preprocess(WEBP, SIZE))


@pytest.mark.parametrize("size", [0, 2**22], ids=["unanswered", "unread"])
def test_a_decoder_that_falls_silent_between_two_images_is_killed(faulty: Sandbox, size: int) -> None:
    faulty.render(WEBP, SIZE)
    _, decoder = family(faulty._server.pid)
    os.kill(decoder, signal.SIGSTOP)
    with pytest.raises(DecoderError):
        faulty.render(WEBP + bytes(size), SIZE)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{decoder}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{decoder}").exists(), "killed only once another image needs a decoder"
    np.testing.assert_array_equal(faulty.render(WEBP, SIZE), preprocess(WEBP, SIZE))


def test_a_stopped_decoder_does_not_outlive_its_worker() -> None:
    sandbox = Sandbox()
    sandbox.render(WEBP, SIZE)
    _, decoder = family(sandbox._server.pid)
    os.kill(decoder, signal.SIGSTOP)
    sandbox._control.close()  # as when the worker exits
    sandbox._server.wait(10)
    assert not Path(f"/proc/{decoder}").exists()


def test_killed_processes_are_replaced_without_failing_an_image() -> None:
    with closing(Sandbox()) as sandbox:
        sandbox.render(WEBP, SIZE)
        for spared in (1, 0):  # first the decoder alone, then the fork server with it
            for victim in family(sandbox._server.pid)[spared:]:
                os.kill(victim, signal.SIGKILL)
            time.sleep(0.2)
            np.testing.assert_array_equal(sandbox.render(WEBP, SIZE), preprocess(WEBP, SIZE))


def test_a_fork_server_killed_again_while_it_is_replaced_fails_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def start_and_kill() -> None:
        start()
        sandbox._server.kill()

    with closing(Sandbox()) as sandbox:
        start = sandbox._start
        sandbox.render(WEBP, SIZE)
        for victim in family(sandbox._server.pid):
            os.kill(victim, signal.SIGKILL)
        time.sleep(0.2)
        with monkeypatch.context() as patch:
            patch.setattr(sandbox, "_start", start_and_kill)
            with pytest.raises(DecoderError, match="could not be started"):
                sandbox.render(WEBP, SIZE)
        np.testing.assert_array_equal(sandbox.render(WEBP, SIZE), preprocess(WEBP, SIZE))


@pytest.mark.parametrize("max_pixels", [MAX_PIXELS, 4 * MAX_PIXELS])
def test_a_decoders_memory_limit_follows_from_max_pixels(max_pixels: int) -> None:
    with closing(Sandbox(max_pixels)) as sandbox:
        sandbox.render(WEBP, SIZE)
        _, decoder = family(sandbox._server.pid)
        limits = dict(
            re.findall(r"^Max (.+?)  +(\d+|unlimited)", Path(f"/proc/{decoder}/limits").read_text(), re.MULTILINE)
        )
    assert limits["data size"] == str(memory_for(max_pixels))
    assert limits["core file size"] == "0"


def test_libraries_leave_most_of_the_memory_limit_on_any_number_of_cpus(sandbox: Sandbox) -> None:
    """OpenBLAS would take 90 MB of the limit for each of its threads, one per CPU: 242 MB in all on two CPUs."""
    sandbox.render(WEBP, SIZE)
    _, decoder = family(sandbox._server.pid)
    (kilobytes,) = re.findall(r"^VmData:\s+(\d+) kB", Path(f"/proc/{decoder}/status").read_text(), re.MULTILINE)
    assert int(kilobytes) * 1024 < BASE_MEMORY * 0.75


@pytest.mark.parametrize(("mode", "kind", "share"), [("RGB", "PNG", 1), ("P", "GIF", 1), ("RGBA", "PNG", ALPHA_COST)])
def test_the_largest_admitted_image_can_be_decoded(sandbox: Sandbox, mode: str, kind: str, share: int) -> None:
    side = int((MAX_PIXELS / share) ** 0.5)
    data = encode(Image.new(mode, (side, side)), kind)
    inspect(data)
    assert sandbox.render(data, SIZE).shape == (*SIZE, 3)


def test_a_decoder_finds_its_module_whatever_the_environment_forbids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    with closing(Sandbox()) as sandbox:
        assert sandbox.render(WEBP, SIZE).shape == (*SIZE, 3)


JPEG, PNG = encode(picture(), "JPEG"), encode(picture())
EXIF = Image.Exif()
EXIF[ExifTags.Base.Orientation] = 6


def patched(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes([value]) + data[at + 1 :]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(encode(picture(), "JPEG", progressive=True), id="progressive JPEG"),
        pytest.param(encode(picture(), "JPEG", exif=EXIF), id="JPEG with EXIF"),
        pytest.param(encode(picture().convert("CMYK"), "JPEG"), id="CMYK JPEG"),
        pytest.param(patched(JPEG, JPEG.index(b"\xff\xc0") + 4, 12), id="12-bit JPEG"),
        pytest.param(patched(JPEG, JPEG.index(b"\xff\xda") + 4, 1), id="JPEG of several scans"),
        pytest.param(encode(picture().convert("I;16")), id="16-bit PNG"),
        pytest.param(encode(picture().convert("LA")), id="PNG with alpha"),
        pytest.param(patched(PNG, 28, 1), id="interlaced PNG"),
        pytest.param(encode(picture(), exif=EXIF), id="PNG with EXIF"),
        pytest.param(PNG[:-12], id="PNG without an end"),
        pytest.param(PNG[:-1], id="PNG cut in its end"),  # libpng prints that to standard error
        *(pytest.param(encode(picture(), kind), id=kind) for kind in FORMATS if kind not in ("JPEG", "PNG")),
    ],
)
def test_what_is_not_plain_is_not_decoded_in_this_process(data: bytes) -> None:
    header = read_header(data)
    assert not header.is_plain
    assert not is_decoded_here(data, header)


def test_plain_images_are_decoded_in_this_process_if_they_are_small() -> None:
    for data in (
        JPEG,
        encode(picture().convert("L"), "JPEG"),
        PNG,
        encode(picture(height=100, width=100), "JPEG", quality=100),
    ):
        assert is_decoded_here(data, read_header(data))
    many_bytes, many_pixels = Image.effect_noise((100, 100), 90), Image.new("RGB", (300, 300))
    for large in (encode(many_bytes, "JPEG", quality=100), encode(many_pixels, "JPEG", quality=100)):
        header = read_header(large)
        assert header.is_plain
        assert not is_decoded_here(large, header)
    large = encode(Image.effect_noise((256, 256), 100))
    assert len(large) > LARGE_BYTES
    assert not is_decoded_here(large, read_header(large))


def test_a_png_of_broken_data_is_not_decoded_in_this_process() -> None:
    """libpng would print that to standard error."""
    at = PNG.index(b"IDAT")
    packed = PNG[at + 4 : -16]
    for data in (patched(packed, 0, 0), packed[:-1]):
        broken = PNG[: at - 4] + len(data).to_bytes(4, "big") + b"IDAT" + data + PNG[-16:]
        assert read_header(broken).is_plain
        assert not is_decoded_here(broken, read_header(broken))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_a_png_with_more_data_than_pixels_is_not_decoded_in_this_process(mode: str) -> None:
    """libpng inflates all of it, 8 MB from 8 KB, while the event loop waits."""
    plain = encode(picture(height=33, width=37).convert(mode))
    assert is_decoded_here(plain, read_header(plain))
    at = plain.index(b"IDAT") - 4
    length = int.from_bytes(plain[at : at + 4], "big")
    pixels = zlib.decompress(plain[at + 8 : at + 8 + length])
    for excess in (b"\0", bytes(2**23)):
        data = zlib.compress(pixels + excess, 9)
        bomb = plain[:at] + len(data).to_bytes(4, "big") + b"IDAT" + data + plain[at + 8 + length :]
        assert len(bomb) < LARGE_BYTES
        header = read_header(bomb)
        assert header.is_plain
        assert not is_decoded_here(bomb, header)


@pytest.fixture
def pipeline(faulty: Sandbox) -> Pipeline:
    return make_pipeline(faulty)


def make_pipeline(sandbox: Sandbox, **settings: Any) -> Pipeline:
    """The real pipeline with the shipped model; ``faulty`` is a decoder that can be made to fail."""
    artifact = Artifact.load(SHIPPED)
    reference = artifact.reference(ONNX_INT8)
    classifier = Classifier(artifact.config, reference)
    engine = runtimes.create(ONNX_INT8, artifact)

    async def infer(images: Pixels) -> Scores:
        return classifier.score(engine(images))

    queue = Batcher(infer, max_batch=64, max_queue=64)
    replies, drift = Replies("toy:1", classifier), Drift(artifact.config, reference)
    return Pipeline(Settings(**settings), classifier, replies, drift, queue, queue, sandbox)


def batch(images: list[bytes]) -> Request:
    body = orjson.dumps({"images": [base64.b64encode(image).decode() for image in images]})
    return request("application/json", body)


@pytest.mark.parametrize("fault", FAULTS)
def test_one_image_among_64_that_kills_its_decoder_fails_alone(
    pipeline: Pipeline, fault: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    images = [encode(picture(i), "WEBP") for i in range(64)]
    images[40] += fault
    before = metrics.DECODER_DEATHS._value.get()
    results = orjson.loads(asyncio.run(pipeline.classify_batch(batch(images))).body)["results"]
    assert [i for i, result in enumerate(results) if "error" in result] == [40]
    assert results[40]["error"]["code"] == "invalid_image"
    assert metrics.DECODER_DEATHS._value.get() - before == 1
    (line,) = caplog.records
    assert line.message == "a decoder died"
    assert line.__dict__["sha256"] == hashlib.sha256(images[40]).hexdigest()


def test_a_decoder_that_dies_after_the_deadline_is_reported(
    pipeline: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    before = metrics.DECODER_DEATHS._value.get()

    async def give_up() -> None:
        request_id.set("impatient")
        async with asyncio.timeout(0.5):
            await pipeline.classify_batch(batch([WEBP + SLEEP]))

    caplog.handler.addFilter(add_request_id)
    with pytest.raises(TimeoutError):
        asyncio.run(give_up())
    deadline = time.monotonic() + 10 * WALL_SECONDS
    while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.05)
    assert metrics.DECODER_DEATHS._value.get() - before == 1
    (line,) = caplog.records
    assert (line.message, line.__dict__["request_id"]) == ("a decoder died", "impatient")


def test_requests_that_come_while_others_are_charged_do_not_overfill_the_decode_queue(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def charge(items: Sequence[Any]) -> None:
        await asyncio.sleep(0.01)  # in a thread, as for the audit log or a key's quota

    async def burst() -> list[Any]:
        pipeline = make_pipeline(sandbox, max_wait=0.001)
        image = encode(picture(0, 1000, 1000))
        await pipeline.classify_batch(batch([image]))  # takes longer than MAX_WAIT
        work = [pipeline.classify_batch(batch([image])) for _ in range(20)]
        return await asyncio.gather(*work, return_exceptions=True)

    monkeypatch.setattr(accounting, "charge", charge)
    outcomes = asyncio.run(burst())
    assert sum(isinstance(outcome, QueueFullError) for outcome in outcomes) > 10


def test_images_that_find_the_queue_full_are_neither_read_nor_charged(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    charged: list[int] = []
    queue = pipeline._infer
    one = base64.b64encode(WEBP).decode()
    body = orjson.dumps({"image": one, "images": [one]})

    async def charge(items: Sequence[Any]) -> None:
        charged.append(len(items))

    async def read_as_it_fills_up() -> Message:
        queue.waiting += 64
        return {"type": "http.request", "body": body}

    monkeypatch.setattr(accounting, "charge", charge)
    for answer in (pipeline.classify, pipeline.classify_batch, pipeline.explain):
        queue.waiting = 0
        for _ in range(2):  # the second finds it full
            with pytest.raises(QueueFullError):
                asyncio.run(answer(request("application/json", read_as_it_fills_up)))
            assert queue.waiting == 64, "read once"
    assert not charged


def test_nothing_is_decoded_or_computed_for_a_client_that_hung_up(pipeline: Pipeline) -> None:
    class Gone:
        disconnected = True

        def __init__(self, body: bytes) -> None:
            self.body = body

        async def receive(self) -> Message:
            return {"type": "http.request", "body": self.body}

    async def ask(client: Gone) -> None:
        watch(client.receive)
        await pipeline.classify(request("image/*", client.receive))

    for image in (WEBP + SLEEP, encode(picture())):  # decoded in a process of its own, where it would fail, and here
        with pytest.raises(GoneError):
            asyncio.run(ask(Gone(image)))


def test_many_small_images_do_not_block_the_event_loop(pipeline: Pipeline) -> None:
    images = [encode(Image.new("RGB", (250, 250), (i, 0, 0))) for i in range(64)]
    assert all(read_header(image).is_plain and len(image) < LARGE_BYTES for image in images), "decoded in the loop"

    async def turns() -> int:
        work, count = asyncio.create_task(pipeline.classify_batch(batch(images))), 0
        while not work.done():
            await asyncio.sleep(0)
            count += 1
        await work
        return count

    assert asyncio.run(turns()) > 5


def test_killed_decoders_of_a_server_are_replaced(server: Server) -> None:
    def post() -> int:
        headers = {"Content-Type": "image/webp"}
        return requests.post(f"{server.url}/classify", data=WEBP, headers=headers, timeout=60).status_code

    def decoders() -> list[int]:
        return [pid for pid in processes(server.home) if b"model.decoder" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    assert {post() for _ in range(20)} == {200}
    before = decoders()
    assert before
    for decoder in before:
        os.kill(decoder, signal.SIGKILL)
    time.sleep(0.5)  # until they are dead: an image held by a dying decoder would fail
    assert {post() for _ in range(20)} == {200}
    assert decoders()
    assert not set(decoders()) & set(before)
