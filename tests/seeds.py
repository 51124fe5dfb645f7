"""Small valid images of every format and kind, and small valid request bodies: the seeds of hostile input."""

from __future__ import annotations

import base64
from typing import Any

import cv2
import numpy as np
import orjson
from PIL import Image

from tests.live import encode, picture

SIDE = 24
BOUNDARY = "seam"
FORM, JSON = f"multipart/form-data; boundary={BOUNDARY}", "application/json"


def images() -> dict[str, bytes]:
    """One image of each kind that decoders treat differently."""
    colour = picture(0, SIDE, SIDE)
    clear, palette = colour.copy(), colour.quantize(16)
    clear.putalpha(128)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = np.asarray(colour).astype(np.uint16) * 257
    found = {
        "jpeg": encode(colour, "JPEG"),
        "jpeg-progressive": encode(colour, "JPEG", progressive=True),
        "jpeg-gray": encode(colour.convert("L"), "JPEG"),
        "jpeg-cmyk": encode(colour.convert("CMYK"), "JPEG"),
        "jpeg-exif": encode(colour, "JPEG", exif=exif),
        "jpeg-restarts": encode(colour, "JPEG", restart_marker_blocks=2),
        "mpo": encode(colour, "MPO", **_frames()),
        "png": encode(colour),
        "png-alpha": encode(clear),
        "png-palette": encode(palette),
        "png-tRNS": encode(palette, transparency=1),
        "png-bits": encode(colour.convert("1")),
        "png-exif": encode(colour, exif=exif),
        "apng": encode(colour, **_frames()),
        "webp": encode(colour, "WEBP"),
        "webp-lossless": encode(colour, "WEBP", lossless=True),
        "webp-alpha": encode(clear, "WEBP"),
        "webp-animated": encode(colour, "WEBP", **_frames()),
        "bmp": encode(colour, "BMP"),
        "bmp-palette": encode(palette, "BMP"),
        "gif": encode(palette, "GIF"),
        "gif-animated": encode(palette, "GIF", save_all=True, append_images=[picture(1, SIDE, SIDE).quantize(16)]),
        "gif-transparent": encode(palette, "GIF", transparency=1),
        "tiff-alpha": encode(clear, "TIFF"),
        "tiff-pages": encode(colour, "TIFF", **_frames()),
        "tiff-cmyk": encode(colour.convert("CMYK"), "TIFF"),
    }
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        found[f"tiff-{compression}"] = encode(colour, "TIFF", compression=compression)
    found["tiff-group4"] = encode(colour.convert("1"), "TIFF", compression="group4")
    for kind in ("png", "tiff"):
        found[f"{kind}-16"] = cv2.imencode(f".{kind}", deep)[1].tobytes()
    return found


def _frames() -> dict[str, Any]:
    """New images each time: Pillow leaves the settings of one encoder in them for the next."""
    return {"save_all": True, "append_images": [picture(1, SIDE, SIDE), picture(2, SIDE, SIDE)]}


def bodies(image: bytes) -> dict[str, tuple[str, bytes]]:
    """Content type and body of each request form, for one image and for several."""
    text = base64.b64encode(image).decode()
    single, several = (_form(name, image, count) for name, count in (("image", 1), ("images", 3)))
    return {
        "raw": ("image/jpeg", image),
        "form": (FORM, single),
        "forms": (FORM, several),
        "json": (JSON, orjson.dumps({"image": text})),
        "url": (JSON, orjson.dumps({"image": f"data:image/png;base64,{text}"})),
        "jsons": (JSON, orjson.dumps({"images": [text, text, "http://127.0.0.1/x.png", None]})),
    }


def _form(name: str, image: bytes, count: int) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="x.jpg"\r\n'
    part = head.encode() + b"Content-Type: image/jpeg\r\n\r\n" + image + b"\r\n"
    return part * count + f"--{BOUNDARY}--\r\n".encode()
