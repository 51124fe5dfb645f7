"""The three request forms, parsed without a server: a request is an ASGI scope plus a list of body chunks."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import tracemalloc
from collections.abc import Sequence
from http import HTTPStatus
from urllib.parse import quote

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from serving.errors import ApiError, from_exception
from serving.requests import Item, _base64, read_image, read_images
from settings import Settings
from tests.asgi import request, sending

SETTINGS = Settings(max_body_bytes=20_000, max_image_bytes=4_096, max_request_images=8)
BOUNDARY = "b0undary"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
JSON = "application/json"


def one(content_type: str | bytes | None, chunks: bytes | Sequence[bytes], **headers: str) -> bytes:
    return asyncio.run(read_image(request(content_type, chunks, **headers), SETTINGS))


def many(content_type: str | bytes | None, chunks: bytes | Sequence[bytes], **headers: str) -> list[Item]:
    return asyncio.run(read_images(request(content_type, chunks, **headers), SETTINGS))


def part(name: str, content: bytes, filename: str | None = "x.jpg") -> bytes:
    disposition = f'form-data; name="{name}"' + (f'; filename="{filename}"' if filename else "")
    return f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + content + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()
# Everything that could be mistaken for structure: line breaks, dashes, pieces of the boundary, NUL and high bytes.
CONTENT = b"\r\n--b0und\r\n--\x00\xff\r\r\n\n--b0undarx" + bytes(range(256)) + b"\r\n"


def test_a_raw_body_is_the_image() -> None:
    assert one("image/jpeg", CONTENT) == CONTENT
    assert one("IMAGE/PNG; charset=binary", [CONTENT[:7], b"", CONTENT[7:]]) == CONTENT


def test_a_form_field_is_the_image() -> None:
    assert one(FORM, part("image", CONTENT) + END) == CONTENT
    assert one(f'Multipart/Form-Data; charset=utf-8; boundary="{BOUNDARY}"', part("image", CONTENT) + END) == CONTENT


def test_text_fields_around_the_file_are_ignored() -> None:
    body = (
        part("note", b"image", None) + part("empty", b"", None) + part("image", CONTENT) + part("z", b"1", None) + END
    )
    assert one(FORM, body) == CONTENT


def test_a_form_may_arrive_in_any_two_pieces() -> None:
    body = part("note", b"hello", None) + part("image", CONTENT) + END
    for cut in range(len(body) + 1):
        assert one(FORM, [body[:cut], body[cut:]]) == CONTENT


def test_a_form_may_arrive_byte_by_byte() -> None:
    body = part("image", CONTENT) + END
    assert one(FORM, [body[i : i + 1] for i in range(len(body))]) == CONTENT


def test_repeated_parts_keep_their_order() -> None:
    contents = [CONTENT, b"", b"two", CONTENT[::-1]]
    assert many(FORM, b"".join(part("images", content) for content in contents) + END) == contents


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


CRLF_LINES = base64.encodebytes(CONTENT).decode().replace("\n", "\r\n")


@pytest.mark.parametrize(
    "text",
    [
        encoded(CONTENT),
        base64.encodebytes(CONTENT).decode(),
        CRLF_LINES,
        f"data:image/jpeg;base64,{encoded(CONTENT)}",
        f"DATA:image/svg+xml;charset=utf-8;BASE64,{encoded(CONTENT)}",
        f"data:;base64,{encoded(CONTENT)}",
        f"data:image/jpeg;base64,{quote(encoded(CONTENT), safe='')}",
        f"data:image/jpeg;base64,{quote(encoded(CONTENT), safe='').replace('%2B', '%2b').replace('%3D', '%3d')}",
        f"data:image/jpeg;base64,{quote(CRLF_LINES)}",
    ],
    ids=[
        "plain",
        "lines",
        "crlf lines",
        "data url",
        "capitals",
        "no type",
        "escapes",
        "escapes in lower case",
        "escaped lines",
    ],
)
def test_json_carries_base64(text: str) -> None:
    assert one(JSON, json.dumps({"image": text, "more": 1}).encode()) == CONTENT
    assert one(f"{JSON}; charset=utf-8", json.dumps({"image": text}).encode()) == CONTENT
    assert many(JSON, json.dumps({"images": [text, text]}).encode()) == [CONTENT, CONTENT]


def refused(
    content_type: str | bytes | None, chunks: bytes | Sequence[bytes], batch: bool = False, **headers: str
) -> tuple[int, str]:
    with pytest.raises(ApiError) as refusal:
        (many if batch else one)(content_type, chunks, **headers)
    assert refusal.value.message
    return int(refusal.value.status), refusal.value.code


INVALID = (400, "invalid_request")
TOO_LARGE = (413, "too_large")
UNSUPPORTED = (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        pytest.param(FORM, part("other", b"x") + END, id="no such field"),
        pytest.param(FORM, b"", id="empty form"),
        pytest.param(FORM, END, id="form without parts"),
        pytest.param(FORM, part("image", b"x"), id="no end"),
        pytest.param(FORM, part("image", b"x")[:40], id="cut in a header"),
        pytest.param(FORM, b"garbage" + part("image", b"x") + END, id="begins with garbage"),
        pytest.param(FORM, f"--{BOUNDARY}\r\nno colon\r\n\r\nx\r\n".encode() + END, id="header without a colon"),
        pytest.param(FORM, f"--{BOUNDARY}\r\n\r\nx\r\n".encode() + END, id="part without a name"),
        pytest.param("multipart/form-data", part("image", b"x") + END, id="no boundary"),
        pytest.param("multipart/form-data; boundary=", part("image", b"x") + END, id="empty boundary"),
        pytest.param("multipart/form-data; boundary=other", part("image", b"x") + END, id="another boundary"),
        pytest.param(JSON, b"", id="empty body"),
        pytest.param(JSON, b"{", id="broken json"),
        pytest.param(JSON, b"\xff\xfe{}", id="not utf-8"),
        pytest.param(JSON, b"[]", id="a list"),
        pytest.param(JSON, b'"image"', id="a string"),
        pytest.param(JSON, b"null", id="null"),
        pytest.param(JSON, b"{}", id="no field"),
        pytest.param(JSON, b'{"image": null}', id="field is null"),
        pytest.param(JSON, b'{"image": 7}', id="field is a number"),
        pytest.param(JSON, b'{"image": true}', id="field is a boolean"),
        pytest.param(JSON, b'{"image": ["aGk="]}', id="field is a list"),
        pytest.param(JSON, b'{"image": {"data": "aGk="}}', id="field is an object"),
        pytest.param(JSON, b'{"image": "!!!"}', id="not base64"),
        pytest.param(JSON, b'{"image": "aGk"}', id="no padding"),
        pytest.param(JSON, b'{"image": "aGk=aGk="}', id="padding within"),
        pytest.param(JSON, '{"image": "Zürich"}'.encode(), id="not ascii"),
        pytest.param(JSON, b'{"image": "http://127.0.0.1/x.jpg"}', id="a url"),
        pytest.param(JSON, b'{"image": "data:image/png,aGk="}', id="data url without base64"),
        pytest.param(JSON, b'{"image": "data:image/png;base64"}', id="data url without data"),
        pytest.param(JSON, b'{"image": "data:image/png;base64,http://127.0.0.1/"}', id="a url in a data url"),
        pytest.param(JSON, b'{"image": "data:image/png;base64,%00%zz%"}', id="other escapes in a data url"),
        pytest.param(JSON, b'{"image": "aGk%3D"}', id="escapes outside a data url"),
        pytest.param(JSON, b"[" * 19_000, id="nested deeply"),
        pytest.param(JSON, b'{"image": "\\ud800"}', id="half a surrogate"),
    ],
)
def test_malformed_requests_are_400(content_type: str, body: bytes) -> None:
    assert refused(content_type, body) == INVALID


def test_a_file_name_may_have_any_encoding() -> None:
    named = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="images"; filename="'.encode()
    body = part("images", b"one") + named + b'\xdcbung.jpg"\r\n\r\n' + b"two\r\n" + part("images", b"three") + END
    assert many(FORM, body) == [b"one", b"two", b"three"]


def test_errors_about_malformed_forms_do_not_quote_them() -> None:
    with pytest.raises(ApiError, match=r"^the form is malformed: [A-Za-z ]+$") as error:
        one(FORM, f"--{BOUNDARY}\r\nno colon, but a secret\r\n\r\nimage".encode() + END)
    assert "secret" not in error.value.message


def test_reading_a_large_batch_lets_other_tasks_run() -> None:
    """Decoding 48 MB of base64 takes a quarter of a second, during which the worker would answer nobody."""
    body = json.dumps({"images": [base64.b64encode(bytes(2**20)).decode()] * 48}).encode()
    large = Settings(max_body_bytes=2**27, max_image_bytes=2**21, max_request_images=48, max_queue=48)
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def read() -> list[Item]:
        others = asyncio.create_task(take_turns())
        items = await read_images(request(JSON, body), large)
        others.cancel()
        return items

    assert asyncio.run(read()) == [bytes(2**20)] * 48
    assert turns > 5


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        pytest.param(FORM, END, id="form without parts"),
        pytest.param(FORM, part("image", b"x") + END, id="the field of the other endpoint"),
        pytest.param(JSON, b'{"images": []}', id="empty list"),
        pytest.param(JSON, b'{"images": "aGk="}', id="a string"),
        pytest.param(JSON, b'{"images": {"0": "aGk="}}', id="an object"),
        pytest.param(JSON, b'{"image": "aGk="}', id="the json field of the other endpoint"),
    ],
)
def test_malformed_batches_are_400(content_type: str, body: bytes) -> None:
    assert refused(content_type, body, batch=True) == INVALID


@pytest.mark.parametrize(
    "content_type",
    [None, "", "text/plain", "application/x-www-form-urlencoded", "application/octet-stream", "video/mp4", "imagejpeg"],
)
def test_other_content_types_are_415(content_type: str | None) -> None:
    assert refused(content_type, b"x") == UNSUPPORTED
    assert refused(content_type, b"x", batch=True) == UNSUPPORTED


def test_a_raw_image_is_not_accepted_as_a_batch() -> None:
    assert refused("image/jpeg", b"x", batch=True) == UNSUPPORTED


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip"])
def test_compressed_bodies_are_415(encoding: str) -> None:
    assert refused("image/jpeg", b"x", content_encoding=encoding) == UNSUPPORTED


@pytest.mark.parametrize("encoding", ["", "identity", "Identity"])
def test_a_body_may_be_called_uncompressed(encoding: str) -> None:
    assert one("image/jpeg", CONTENT, content_encoding=encoding) == CONTENT


class Endless:
    """An endless body that counts how much of it was requested."""

    def __init__(self) -> None:
        self.read = 0

    async def receive(self) -> Message:
        self.read += 1000
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}


@pytest.mark.parametrize(
    ("value", "count"),
    [
        *((value, 110_000) for value in ("[]", "{}", '{"":1}', "1", '""')),
        pytest.param("[" * 1000 + "]" * 1000, 110, id="nested lists"),
        pytest.param('{"":' * 1000 + "1" + "}" * 1000, 110, id="nested objects"),
    ],
)
@pytest.mark.parametrize("batch", [False, True])
def test_json_with_many_values_is_refused_before_objects_are_created(value: str, count: int, batch: bool) -> None:
    body = f'{{"image": "", "images": [{",".join([value] * count)}]}}'.encode()
    settings = SETTINGS.model_copy(update={"max_body_bytes": len(body)})
    asked = request(JSON, body)
    tracemalloc.start()
    with pytest.raises(ApiError, match="brackets and commas") as refusal:
        asyncio.run((read_images if batch else read_image)(asked, settings))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (refusal.value.status, refusal.value.code) == TOO_LARGE
    assert most < 50_000 + 2 * len(body)


@pytest.mark.parametrize("text", ["AAAA " * 100_000, "data:;base64," + "AAA%2B" * 100_000])
def test_pieces_of_base64_take_no_extra_memory(text: str) -> None:
    """One string per piece, for millions of pieces, would take twenty times the memory of the body."""
    tracemalloc.start()
    assert len(_base64(text)) == 300_000
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 3 * len(text)


@pytest.mark.parametrize(("content_type", "limit"), [("image/png", 4_096), (FORM, 20_000), (JSON, 20_000)])
def test_reading_stops_at_the_limit(content_type: str, limit: int) -> None:
    body = Endless()
    with pytest.raises(ApiError) as refusal:
        asyncio.run(read_image(request(content_type, body.receive), SETTINGS))
    assert refusal.value.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    assert body.read <= limit + 1000


def test_an_announced_length_over_the_limit_is_refused_unread() -> None:
    body = Endless()
    with pytest.raises(ApiError) as refusal:
        asyncio.run(read_image(request("image/png", body.receive, content_length="4097"), SETTINGS))
    assert refusal.value.code == "too_large"
    assert body.read == 0


@pytest.mark.parametrize("length", ["0", "1", "-1", "", "x", "1e9", "4096", " 12", "+5", "\u00b2", "0x10"])
def test_a_false_content_length_changes_nothing(length: str) -> None:
    assert one("image/png", b"abc", content_length=length) == b"abc"
    assert refused("image/png", b"x" * 4097, content_length=length) == TOO_LARGE


def test_an_absurd_length_is_refused() -> None:
    assert refused("image/png", b"abc", content_length="9" * 5000) == TOO_LARGE


def test_a_caller_that_hangs_up_is_not_a_server_error() -> None:
    half = sending([b"half of"], {"type": "http.disconnect"})
    with pytest.raises((ApiError, ClientDisconnect)) as refusal:
        asyncio.run(read_image(request("image/png", half), SETTINGS))
    assert from_exception(refusal.value).status < HTTPStatus.INTERNAL_SERVER_ERROR


def test_limits_are_exact() -> None:
    fits, exceeds = b"x" * 4096, b"x" * 4097
    assert one("image/png", fits) == fits
    assert one(FORM, part("image", fits) + END) == fits
    assert one(JSON, json.dumps({"image": encoded(fits)}).encode()) == fits
    assert refused("image/png", exceeds) == TOO_LARGE
    assert refused(FORM, part("image", exceeds) + END) == TOO_LARGE
    assert refused(JSON, json.dumps({"image": encoded(exceeds)}).encode()) == TOO_LARGE


def test_no_image_may_exceed_the_limit_of_a_body() -> None:
    settings = SETTINGS.model_copy(update={"max_body_bytes": SETTINGS.max_image_bytes - 1})
    with pytest.raises(ApiError) as refusal:
        asyncio.run(read_image(request("image/png", b"x" * SETTINGS.max_image_bytes), settings))
    assert refusal.value.code == "too_large"


@pytest.mark.parametrize("content_type", [FORM, JSON])
def test_an_image_that_is_too_large_for_a_batch_is_not_kept(content_type: str) -> None:
    """It could be, in the traceback of its error, until the reply."""
    image, settings = bytes(2**20), SETTINGS.model_copy(update={"max_body_bytes": 2**22})
    form, document = part("images", image) + END, json.dumps({"images": [encoded(image)]}).encode()
    sent = request(content_type, form if content_type == FORM else document)
    tracemalloc.start()
    (item,) = asyncio.run(read_images(sent, settings))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(item, ApiError)
    assert held < len(image) / 2


def test_too_many_images_are_413() -> None:
    assert len(many(FORM, part("images", b"x") * 8 + END)) == 8
    assert refused(FORM, part("images", b"x") * 9 + END, batch=True) == TOO_LARGE
    assert refused(JSON, json.dumps({"images": ["aGk="] * 9}).encode(), batch=True) == TOO_LARGE
    assert refused(FORM, part("image", b"x") * 2 + END) == TOO_LARGE


def test_too_many_parts_are_413_whatever_their_names() -> None:
    assert refused(FORM, part("n", b"", None) * 200 + part("image", b"x") + END) == TOO_LARGE
    assert refused(FORM, part("n", b"", None) * 200 + END, batch=True) == TOO_LARGE


def test_an_endless_part_header_is_413() -> None:
    huge = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; x="'.encode() + b"y" * 15_000
    assert refused(FORM, huge + b'"\r\n\r\nx\r\n' + END) == TOO_LARGE


def test_one_bad_image_does_not_affect_the_batch() -> None:
    large = encoded(b"x" * 4097)
    images = many(JSON, json.dumps({"images": ["aGk=", "!", None, large, "http://127.0.0.1/", "aG8="]}).encode())
    assert [image if isinstance(image, bytes) else (int(image.status), image.code) for image in images] == [
        b"hi",
        INVALID,
        INVALID,
        TOO_LARGE,
        INVALID,
        b"ho",
    ]
    images = many(FORM, part("images", b"hi") + part("images", b"x" * 4097) + part("images", b"ho") + END)
    assert [image if isinstance(image, bytes) else (int(image.status), image.code) for image in images] == [
        b"hi",
        TOO_LARGE,
        b"ho",
    ]


TOKENS = [
    f"--{BOUNDARY}".encode(),
    f"--{BOUNDARY}--".encode(),
    b"\r\n",
    b"\r\n\r\n",
    b"Content-Disposition: form-data",
    b'; name="image"',
    b"; name=images",
    b'; filename="a\\"b"',
    b"; filename*=utf-8''%ff",
    b"Content-Type: text/plain; charset=nonsense",
    b"Content-Length: -1",
    b"Content-Transfer-Encoding: base64",
    b":",
    b'"',
    b"\x00\xff",
    b'{"image": "',
    b'{"images": ["',
    b'"]}',
    b'"}',
    b"data:;base64,",
    b"aGk=",
    b"\\u0000",
]
TYPES = [
    FORM.encode(),
    b"multipart/form-data; boundary=\xff\xfe",
    b'multipart/form-data; boundary="a\\"b"',
    b"multipart/form-data; boundary*=utf-8''%C3%A9",
    b"multipart/form-data; boundary=" + b"x" * 300,
    b"multipart/form-data; boundary=" + BOUNDARY.encode() + b"; charset=utf-16",
    b"application/json; charset=utf-16",
    b"application/json",
    b"image/",
    b"image/\xff",
    b";;;=",
    b'"',
]


def test_arbitrary_bytes_raise_nothing_but_api_errors() -> None:
    """Random structure from real tokens: purely random bytes would never get past the first one."""
    generator = random.Random(20)
    answered = 0
    refusals: list[int] = []
    for _ in range(3_000):
        body = b"".join(
            generator.choice(TOKENS) if generator.random() < 0.9 else generator.randbytes(generator.randrange(9))
            for _ in range(generator.randrange(14))
        )
        content_type = (
            generator.choice(TYPES)
            if generator.random() < 0.5
            else generator.choice([FORM.encode(), b"application/json"])
        )
        cut = generator.randrange(len(body) + 1)
        for read in (read_image, read_images):
            try:
                asyncio.run(read(request(content_type, [body[:cut], body[cut:]]), SETTINGS))
                answered += 1
            except ApiError as error:
                refusals.append(int(error.status))
    assert answered > 50
    assert len(refusals) > 1_000
    assert set(refusals) <= {400, 413, 415}
