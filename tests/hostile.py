"""Thousands of hostile requests, the same ones each run: mutations of small valid inputs, and known tricks by hand."""

from __future__ import annotations

import base64
import random
import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import orjson

from tests import seeds
from tests.live import png_header

PER_SEED = 60
"""Mutations per seed, image or body."""
EXTREMES = [
    struct.pack(order + code, value)
    for order in "<>"
    for code, value in (
        ("H", 0),
        ("H", 0xFFFF),
        ("H", 0x7FFF),
        ("I", 0),
        ("I", 0xFFFFFFFF),
        ("I", 0x7FFFFFFF),
        ("I", 60_000),
    )
]


class Hostile(NamedTuple):
    path: str
    content_type: str
    body: bytes


def requests() -> list[Hostile]:
    """Every hostile request, once each."""
    return list(dict.fromkeys([*_images(), *_bodies(), *_by_hand()]))


def mutate(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Corrupt ``data`` in one of the ways in which files break or are made to."""
    at = rng.randrange(len(data))
    match rng.randrange(8):
        case 0:
            return data[:at]
        case 1:
            return data[at:]
        case 2:
            return _overwrite(data, at, bytes([rng.randrange(256)]))
        case 3:
            return _overwrite(data, min(at, 64), rng.choice(EXTREMES))
        case 4:
            return _overwrite(data, at, rng.randbytes(rng.randrange(1, 64)))
        case 5:
            return data[:at] + data[at : at + rng.randrange(1, 200)] * rng.randrange(2, 20) + data[at:]
        case 6:
            return data[:at] + rng.choice(others)[at:]
        case _:
            return _mended(_overwrite(data, at, rng.choice(EXTREMES)))


def _overwrite(data: bytes, at: int, what: bytes) -> bytes:
    return data[:at] + what + data[at + len(what) :]


def _mended(data: bytes) -> bytes:
    """A PNG with the correct checksum after every chunk: a wrong one would hide any fault behind it."""
    at, mended = 8, bytearray(data)
    while data.startswith(b"\x89PNG") and at + 12 <= len(data):
        end = at + 8 + struct.unpack_from(">I", data, at)[0]
        if end + 4 > len(data):
            break
        struct.pack_into(">I", mended, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(mended)


def _images() -> Iterator[Hostile]:
    images = seeds.images()
    others = list(images.values())
    for name, image in images.items():
        rng = random.Random(name)
        for _ in range(PER_SEED):
            yield Hostile("/classify", "image/" + rng.choice(["jpeg", "png", "x"]), mutate(image, rng, others))


def _bodies() -> Iterator[Hostile]:
    bodies = seeds.bodies(seeds.images()["jpeg"])
    others = [body for _, body in bodies.values()]
    for name, (content_type, body) in bodies.items():
        rng = random.Random(name)
        for _ in range(PER_SEED):
            path = rng.choice(["/classify", "/classify/batch", "/explain"])
            yield Hostile(path, content_type, mutate(body, rng, others))
            if "=" in content_type:
                kind = mutate(content_type.encode(), rng, others)[:200]
                yield Hostile(path, re.sub(r"[^ -~\x80-\xff]", "", kind.decode("latin-1")), body)


def _by_hand() -> Iterator[Hostile]:
    for image in (*_bombs(), *_polyglots(), *_other_formats()):
        yield Hostile("/classify", "image/png", image)
        yield Hostile("/classify", seeds.JSON, orjson.dumps({"image": base64.b64encode(image).decode()}))
    for document in _documents():
        for path in ("/classify", "/classify/batch"):
            yield Hostile(path, seeds.JSON, document)
    for form in _forms():
        for path in ("/classify", "/classify/batch"):
            yield Hostile(path, seeds.FORM, form)


def _bombs() -> Iterator[bytes]:
    """Tiny files whose headers announce more than any machine can hold."""
    for width, height in (
        (60_000, 60_000),
        (2**31 - 1, 2**31 - 1),
        (2**31 - 1, 1),
        (40_000, 1),
        (1, 40_000),
        (0, 0),
        (0, 9),
    ):
        side = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
        yield png_header(width, height)
        yield b"GIF89a" + side + bytes(3) + b"," + bytes(4) + side + bytes(9)
        yield b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, width, height, 1, 24, 0) + bytes(24)
        yield b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + 2 * struct.pack("<I", width)[:3] + bytes(9)
        yield (
            b"\xff\xd8\xff\xc0\0\x11\x08"
            + struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
            + b"\3\1\x11\0\2\x11\0\3\x11\0\xff\xda\0\x0c\3\1\0\2\0\3\0\0\x3f\0"
        )
        for order, magic in (("<", b"II*\0"), (">", b"MM\0*")):
            entries = ((256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (278, height), (279, 2**31))
            ifd = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in entries)
            yield magic + struct.pack(order + "IH", 8, len(entries)) + ifd + bytes(4)
    for compression in range(2, 14):
        yield b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 9, 9, 1, 24, compression) + seeds.images()["jpeg"]
    for compression in (6, 99, 34661, 34676, 34712, 34887, 34925, 50000, 50001, 50002, 65535):
        yield seeds.images()["tiff-raw"].replace(*(struct.pack("<HHII", 259, 3, 1, c) for c in (1, compression)))
    for length in (2**31 - 1, 2**32 - 1, 2**30, 10**8):  # a chunk whose data is missing
        image = seeds.images()["png"]
        for kind in (b"tEXt", b"iCCP", b"eXIf", b"acTL", b"UP8X", b"IDAT", b"IEND"):
            yield image[:33] + struct.pack(">I", length) + kind + image[33:]
    yield b"\xff\xd8" + b"\xff" * 100_000
    yield b"\xff\xd8" + b"\xff\xe0\0\2" * 50_000
    yield b"GIF89a\x09\0\x09\0\0\0\0" + b"!\xfe" + b"\1x" * 50_000
    yield b"II*\0\x08\0\0\0\xff\xff" + struct.pack("<HHII", 700, 1, 500_000, 8) * 65_535


def _polyglots() -> Iterator[bytes]:
    """Data that starts as one format and is another."""
    images = seeds.images()
    starts = [image[:size] for image in images.values() for size in (4, 12)]
    rest = [
        b"%PDF-1.7\n",
        b"PK\x03\x04",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"#!/bin/sh\n",
        b"8BPS\0\1",
        b"\x7fELF",
    ]
    for start in dict.fromkeys(starts):
        yield from (start + other * 20 for other in rest)


def _other_formats() -> Iterator[bytes]:
    """Formats that OpenCV or Pillow could decode, but that must stay out of reach."""
    yield from (
        magic + bytes(200)
        for magic in (
            b"8BPS\0\1",
            b"%!PS-Adobe-3.0 EPSF-3.0\n",
            b"P6\n9 9\n255\n",
            b"P4\n9 9\n",
            b"P7\nWIDTH 9\n",
            b"PF\n9 9\n-1\n",
            b"#?RADIANCE\n",
            b"#?RGBE\n",
            b"\x76\x2f\x31\x01",
            b"\0\0\0\x0cjP  \r\n\x87\n",
            b"\xff\x4f\xff\x51",
            b"\0\0\0\x20ftypavif",
            b"\0\0\0\x18ftypheic",
            b"\x59\xa6\x6a\x95",
            b"\0\0\1\0",
            b"\0\0\2\0",
            b"\x0a\5\1\x08",
            b"DDS ",
            b"qoif",
            b"icns",
            b"II+\0\x08\0\0\0",
            b"MM\0+\0\x08\0\0",
            b"FORM\0\0\0\0ILBM",
            b"RIFF\0\0\0\0WAVE",
            b"RIFF\0\0\0\0AVI ",
            b"\x01\xda\1\1\0\3",
            b"SIMPLE  =",
            b"\x89HDF\r\n\x1a\n",
            b"GIF88a",
            b"BA",
            b"\x8aMNG",
            b"\x8bJNG",
            b"<?xml version='1.0'?><svg/>",
            b"\xd7\xcd\xc6\x9a",
            b"\1\0\0\0",
            b"CD001",
            b"\xff\x0a",
            b"JXL ",
        )
    )


def _documents() -> Iterator[bytes]:
    values = [
        b"NaN",
        b"Infinity",
        b"1e999",
        b"-0",
        b"null",
        b"true",
        b"[]",
        b"{}",
        b'""',
        b'"x"',
        b'"====" ',
        b'"\\ud800"',
        b'"\\u0000"',
        b'"http://127.0.0.1/x.png"',
        b'"file:///etc/passwd"',
        b'"data:,"',
        b'"data:image/png;base64,!"',
        b'"' + b"A" * 99_999 + b'"',
        b'"' + b" " * 99_999 + b'"',
        b"[" * 99_999,
        b'{"a":' * 9_999,
        b'"\xff\xfe"',
        b"9" * 9_999,
        b"[null]",
        b"[1,2]",
        b'[["aGk="]]',
        b'[{"image": "aGk="}]',
    ]
    for value in values:
        for name in (b"image", b"images"):
            yield b'{"' + name + b'": ' + value + b"}"
        yield value
        yield b'{"image": "aGk=", "image": ' + value + b', "images": ' + value + b"}"


def _forms() -> Iterator[bytes]:
    part, end = b'--seam\r\nContent-Disposition: form-data; name="%s"\r\n\r\nx\r\n', b"--seam--\r\n"
    image = part % b"image"
    yield from (
        part % b"x" * 5_000 + end,
        image * 5_000 + end,
        part % b"images" * 5_000 + end,
        image * 2,
        end * 100,
        b"",
    )
    yield from (
        b"--seam\r\n" + b"A: b\r\n" * 5_000 + b"\r\nx\r\n" + end,
        b"--seam\r\n" * 9_999,
        b"\r\n" * 99_999 + image + end,
    )
    for head in (
        b"",
        b"A",
        b"A:",
        b": b",
        b"A: " + b"x" * 99_999,
        b"Content-Disposition: form-data",
        b"Content-Disposition: x; name=image",
        b"Content-Disposition: form-data; name=" + b'"' * 999,
        b"Content-Disposition: form-data; name*=utf-8''image",
        b'Content-Disposition: form-data; name="image"; filename="../../etc/passwd"',
        b'Content-Disposition: form-data; name="image"; filename="' + b"x" * 4_000 + b'"',
        b'Content-Disposition: form-data; name="image"; filename="\0"',
        b'Content-Disposition: form-data; name="image"\r\nContent-Length: -1',
        b'Content-Disposition: form-data; name="image"\r\nContent-Transfer-Encoding: base64',
        b'Content-Disposition: form-data; name="image"\r\nContent-Type: multipart/mixed; boundary=seam',
        b'Content-Disposition: form-data; name="image"\r\nContent-Encoding: gzip',
        b"\xff\xfe: \x00",
        b"A: b\n\nC: d",
    ):
        yield b"--seam\r\n" + head + b"\r\n\r\nhello\r\n" + end
