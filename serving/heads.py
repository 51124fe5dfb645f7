"""The head of a plain request that arrived whole, read without the parser: refusing it takes half the time."""

from __future__ import annotations

import re

UPGRADING = frozenset((b"upgrade", b"http2-settings"))
"""Headers that ask for another protocol."""
WHOLE_POST = re.compile(rb"POST ([!-~]++) HTTP/1\.1\r\n((?:[!#-'*+.0-9A-Z^_`a-z|~-]++:[\t -~\x80-\xff]*+\r\n)++)\r\n")
"""Target and headers, to the letter of RFC 9112; anything written otherwise is left to the parser."""
FIELD = re.compile(rb"([^:]++):[\t ]*+([^\r]*+)\r\n")
DIGITS = re.compile(rb"[0-9]{1,18}")
CHANGING = UPGRADING | {b"transfer-encoding", b"expect"}
"""Headers that change how a request is read or answered."""
CONNECTION = (b"connection", b"proxy-connection")


def read_whole(data: bytes) -> tuple[bytes, list[tuple[bytes, bytes]]] | None:
    """Target and headers, with lower-case names, if ``data`` is exactly one plain POST; None if it needs the parser."""
    post = WHOLE_POST.match(data)
    if not post:
        return None
    headers, length = [], None
    for name, value in FIELD.findall(post[2]):
        name, value = name.lower(), value.rstrip(b"\t ")
        if name == b"content-length":
            if length is not None or not DIGITS.fullmatch(value):
                return None
            length = int(value)
        elif name in CHANGING or (name in CONNECTION and value.lower() != b"keep-alive"):
            return None
        headers.append((name, value))
    return (post[1], headers) if len(data) == post.end() + (length or 0) else None
