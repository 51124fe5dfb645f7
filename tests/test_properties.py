"""Properties of any image, any bytes and any request; hypothesis draws the examples, the same ones each run."""

from __future__ import annotations

import asyncio
import base64
import io
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any
from urllib.parse import urlencode

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model.headers import FORMATS, Header, ImageError, read_header
from model.preprocess import inspect, preprocess, render, shrink
from serving.context import choose_request_id
from serving.errors import ApiError
from serving.options import read_options, read_timeout
from serving.requests import Item, read_image, read_images
from settings import Settings
from tests import seeds
from tests.asgi import request
from tests.live import encode

settings.register_profile("ours", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("ours")

LIMITS = Settings(max_body_bytes=20_000, max_image_bytes=4_096, max_request_images=8)
IMAGES = seeds.images()
MAGIC = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"RIFF\0\0\0\0WEBPVP8X",
    b"BM",
    b"GIF89a",
    b"II*\0\x08\0\0\0",
    b"MM\0*\0\0\0\x08",
)
MODES = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("L", "P"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"),
}
sides = st.integers(1, 60)
some_image = st.sampled_from(sorted(IMAGES)).map(IMAGES.__getitem__)


@st.composite
def pictures(draw: st.DrawFn) -> tuple[str, Image.Image]:
    """A format, and a picture of any size in any mode that the format can store."""
    kind = draw(st.sampled_from(FORMATS))
    noise = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, (draw(sides), draw(sides), 4), np.uint8)
    image = Image.fromarray(noise)
    mode = draw(st.sampled_from(MODES[kind]))
    return kind, image.convert("RGB").quantize(16) if mode == "P" else image.convert(mode)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """An image of any kind with a piece cut out or overwritten."""
    data = draw(some_image)
    start = draw(st.integers(0, len(data) - 1))
    return data[:start] + draw(st.binary(max_size=40)) + data[start + draw(st.integers(0, 80)) :]


def outcome(work: Callable[[], Any]) -> Any:
    """The return value of ``work``, or the error of ours that it raises."""
    try:
        return work()
    except (ImageError, ApiError) as error:
        return error


@given(pictures())
def test_a_header_describes_what_the_file_contains(picture: tuple[str, Image.Image]) -> None:
    kind, image = picture
    data = encode(image, kind)
    header = read_header(data)
    assert (header.format, header.width, header.height) == (kind, *image.size)
    with Image.open(io.BytesIO(data)) as opened:
        assert header.has_alpha == opened.has_transparency_data


@given(pictures(), st.tuples(sides, sides), sides)
def test_every_picture_is_resized_to_the_requested_size(
    picture: tuple[str, Image.Image], size: tuple[int, int], longest: int
) -> None:
    kind, image = picture
    data = encode(image, kind)
    pixels = preprocess(data, size)
    assert (pixels.shape, pixels.dtype) == ((*size, 3), np.uint8)
    shown = shrink(data, inspect(data), longest)
    assert max(shown.shape[:2]) == min(longest, max(image.size))


@given(st.binary(max_size=300) | st.tuples(st.sampled_from(MAGIC), st.binary(max_size=300)).map(b"".join))
def test_any_bytes_give_a_header_or_an_error(data: bytes) -> None:
    header = outcome(lambda: read_header(data))
    assert str(header)
    if isinstance(header, Header):
        assert min(header.width, header.height) > 0


@given(damaged())
def test_damaged_images_give_pixels_or_errors(data: bytes) -> None:
    pixels = outcome(lambda: render(data, inspect(data, 10_000), (8, 8)))
    if isinstance(pixels, np.ndarray):
        assert (pixels.shape, pixels.dtype) == ((8, 8, 3), np.uint8)


def read(content_type: str, chunks: Sequence[bytes]) -> list[Item]:
    return asyncio.run(read_images(request(content_type, chunks), LIMITS))


def in_pieces(body: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    return [body[start:end] for start, end in pairwise(places)]


def form(boundary: str, contents: list[bytes]) -> bytes:
    part = f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\n'.encode()
    return b"".join(part + content + b"\r\n" for content in contents) + f"--{boundary}--\r\n".encode()


contents = st.lists(st.binary(max_size=400), min_size=1, max_size=8)
cuts = st.lists(st.integers(0, 10**6), max_size=6)


@given(contents, cuts, st.from_regex(r"[A-Za-z0-9'()+_,./:=?-]{1,70}", fullmatch=True))
def test_form_contents_round_trip(contents: list[bytes], cuts: list[int], boundary: str) -> None:
    body = form(boundary, contents)
    if any(f"--{boundary}".encode() in content for content in contents):
        return
    assert read(f'multipart/form-data; boundary="{boundary}"', in_pieces(body, cuts)) == contents


@given(contents, cuts)
def test_json_contents_round_trip(contents: list[bytes], cuts: list[int]) -> None:
    body = orjson.dumps({"images": [base64.b64encode(content).decode() for content in contents]})
    assert read("application/json", in_pieces(body, cuts)) == contents


BODY_KINDS = st.sampled_from(["application/json", "multipart/form-data; boundary=b", "image/png", ""]) | st.text(
    st.characters(codec="latin-1"), max_size=60
)
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=20), lambda inner: st.lists(inner, max_size=4)
)


@given(
    BODY_KINDS,
    st.binary(max_size=300)
    | st.fixed_dictionaries({"image": json_values, "images": json_values}).map(orjson.dumps)
    | contents.map(lambda parts: form("b", parts)),
)
def test_any_request_gives_images_or_a_documented_error(content_type: str, body: bytes) -> None:
    for reader in (read_image, read_images):
        found = outcome(lambda reader=reader: asyncio.run(reader(request(content_type, [body]), LIMITS)))
        if isinstance(found, ApiError):
            assert found.status in (400, 413, 415)
            assert found.message
        elif isinstance(found, list):
            assert 1 <= len(found) <= LIMITS.max_request_images


@given(
    st.dictionaries(
        st.sampled_from(["prediction_set", "abstain_below", "abstain_foreign", "top"]) | st.text(), st.text()
    )
)
def test_any_query_gives_options_or_a_400(query: dict[str, str]) -> None:
    encoded = urlencode(query, errors="surrogatepass").encode()
    options = outcome(lambda: read_options(request("", b"", encoded)))
    if isinstance(options, ApiError):
        assert options.status == 400
    else:
        assert options.abstain_below is None or 0 < options.abstain_below < 1
        assert options.top is None or options.top >= 1


@given(st.text(st.characters(codec="latin-1"), max_size=50) | st.floats().map(str))
def test_any_deadline_is_within_the_limit_or_a_400(asked: str) -> None:
    seconds = outcome(lambda: read_timeout(request("", b"", x_request_timeout=asked), 10))
    if isinstance(seconds, ApiError):
        assert seconds.status == 400
    else:
        assert 0 < seconds <= 10


@given(st.text(max_size=100) | st.from_regex(r"[A-Za-z0-9._-]{1,70}", fullmatch=True))
def test_any_request_id_is_harmless(sent: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", choose_request_id(sent))


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_every_seed_is_a_valid_image(name: str) -> None:
    """Otherwise what is made from it would be refused for the wrong reason."""
    assert preprocess(IMAGES[name], (8, 8)).shape == (8, 8, 3)
