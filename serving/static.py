"""The demo page: the files of ``serving/page``, read once and served from memory, with index.html at ``/``.

It stands beside BentoML's application: its files create no metric series, and no API call passes through it.
"""

from __future__ import annotations

import hashlib
from http import HTTPStatus
from pathlib import Path

import orjson
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.errors import from_status

FOLDER = Path(__file__).parent / "page"
INDEX, SAMPLES = "/page/index.html", "/page/samples.json"
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".jpg": "image/jpeg",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
"""Media types by suffix; a file with another suffix is not served."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # Cached, but revalidated each time, so that modules of two releases never meet in one page.
    "cache-control": "no-cache",
}


class Page:
    """An ASGI application; raises ``ApiError`` for what it does not serve."""

    def __init__(self, folder: Path = FOLDER) -> None:
        files = {
            f"/page/{file.relative_to(folder).as_posix()}": (file.read_bytes(), TYPES[file.suffix])
            for file in sorted(folder.rglob("*"))
            if file.suffix in TYPES
        }
        # The sample pictures are the files of that folder, each named after its class.
        samples = [path.removeprefix("/page/") for path in files if path.startswith("/page/samples/")]
        files[SAMPLES] = orjson.dumps(samples), "application/json"
        files["/"] = files.pop(INDEX)
        self._files = {path: (body, _headers(body, kind)) for path, (body, kind) in files.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in self._files:
            raise from_status(HTTPStatus.NOT_FOUND)
        if scope["method"] not in ("GET", "HEAD"):
            refusal = from_status(HTTPStatus.METHOD_NOT_ALLOWED)
            refusal.headers["allow"] = "GET, HEAD"
            raise refusal
        body, headers = self._files[scope["path"]]
        if headers["etag"] in Headers(scope=scope).get("if-none-match", ""):
            response = Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        else:
            response = Response(body, headers=headers)
        await response(scope, receive, send)


def _headers(body: bytes, kind: str) -> dict[str, str]:
    return {"content-type": kind, "etag": f'"{hashlib.sha256(body).hexdigest()[:32]}"', **HEADERS}
