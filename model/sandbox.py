"""Decoding in a process of its own, so that an image that crashes, hangs or bloats its decoder harms no other.

All images go there except plain and small ones (``Header.is_plain``, ``serving.pipeline``): baseline JPEG and opaque
8-bit PNG of a few kilobytes, the traffic that matters most, are left to the best-proven code of libjpeg-turbo and
libpng. The rest is where decoders break: TIFF, WebP, GIF and BMP, transparency, 16 bits, animation, EXIF, several
scans, and anything large.

Processor time in microseconds for an image of 32x32 pixels, decoded in this process and through the sandbox (in the
caller, which waits for about 100 in all): WebP 18 and 36, BMP 5 and 31, GIF 61 and 39, TIFF 19 and 38; a PNG would take
33 and 43, and a JPEG 32 and 63. From a hundred kilobytes on, the detour costs nothing measurable.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from model.config import CHANNELS
from model.decoder import END, ERRORS, FORK
from model.headers import ImageError
from model.preprocess import MAX_PIXELS, Pixels

ROOT = Path(__file__).parent.parent
"""Folder that contains the package, in a Bento as in a checkout."""
COMMAND = (sys.executable, "-m", "model.decoder")
MAX_ANSWER_BYTES = 2**16
"""Limit on a decoder's answer about an image, apart from its pixels."""
START_SECONDS = 60.0
"""Time for the fork server to import everything, on a machine that has other work to do."""


class DecoderError(ImageError):
    """The decoder could not be started, or died of the image: it crashed, or exceeded its limits of time or memory."""


class Sandbox:
    """One decoder, replaced when it dies, with memory for images of up to ``max_pixels``. Belongs to one thread."""

    def __init__(self, max_pixels: int = MAX_PIXELS, command: Sequence[str] = COMMAND) -> None:
        self._command = (*command, str(max_pixels))
        self._decoder: Connection | None = None
        self._start()

    def render(self, data: bytes, size: tuple[int, int]) -> Pixels:
        """``preprocess.render``; raises ``ImageError``."""
        return self._ask(data, {"size": size}, size[0] * size[1], lambda height, width: (height, width) == size)

    def shrink(self, data: bytes, longest: int) -> Pixels:
        """``preprocess.shrink``; raises ``ImageError``."""
        return self._ask(data, {"longest": longest}, longest**2, lambda *sides: max(sides) <= longest)

    def close(self) -> None:
        self._drop()
        self._control.close()
        self._server.kill()
        self._server.wait()

    def _ask(self, data: bytes, task: dict[str, Any], most: int, fits: Callable[[int, int], bool]) -> Pixels:
        """Have the decoder do ``task``; raises ``ImageError``.

        A malicious image may have taken the decoder over, to forge the answers to this request and the next ones: one
        whose answer does not fit, or has more than ``most`` pixels, is dropped, which raises ``DecoderError``.
        """
        decoder = self._ensure_decoder()
        try:
            decoder.send_bytes(orjson.dumps(task))
            decoder.send_bytes(data)
            answer = orjson.loads(decoder.recv_bytes(MAX_ANSWER_BYTES))
            outcome = _parse_answer(answer, decoder.recv_bytes(3 * most))
            if isinstance(outcome, np.ndarray) and not fits(*outcome.shape[:2]):
                raise ValueError(f"pixels of shape {outcome.shape}")
        except (EOFError, OSError, LookupError, TypeError, ValueError):
            self._drop()
            raise DecoderError("the image cannot be decoded: its decoder had to be ended") from None
        if isinstance(outcome, ImageError):
            raise outcome
        return outcome

    def _ensure_decoder(self) -> Connection:
        """The decoder, or a new one if the last has died, even between two images: its socket is then readable."""
        if self._decoder and self._decoder.poll():
            self._drop()
        self._decoder = self._decoder or self._fork()
        if not self._decoder:  # the fork server was killed
            self.close()
            self._start()
            self._decoder = self._fork()
        if not self._decoder:  # again, before it had started
            self.close()
            raise DecoderError("the image cannot be decoded: its decoder could not be started")
        return self._decoder

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START_SECONDS)
        with theirs:
            # Native code may print, which would break the format of the log.
            self._server = subprocess.Popen(
                self._command,
                cwd=ROOT,
                # numpy and OpenCV bundle an OpenBLAS each, with 90 MB per processor: soon more than a decoder may have.
                # ``-m`` finds its module in ``cwd``, unless the caller's environment forbids that.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONSAFEPATH": ""},
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def _fork(self) -> Connection | None:
        """A new decoder, or None if the fork server was killed or does not answer: close it before asking again."""
        descriptors: list[int] = []
        with suppress(OSError):
            self._control.send(FORK)
            _, descriptors, _, _ = socket.recv_fds(self._control, 1, 1)
        return Connection(descriptors[0]) if descriptors else None

    def _drop(self) -> None:
        if self._decoder:
            self._decoder.close()
            self._decoder = None
            with suppress(OSError):  # the fork server was killed, too
                self._control.send(END)


def _parse_answer(answer: dict[str, Any], pixels: bytes) -> Pixels | ImageError:
    if "error" in answer:
        return ERRORS[answer["error"]](answer["message"])
    height, width, channels = answer["shape"]
    if channels != CHANNELS:
        raise ValueError(f"{channels} channels")
    return np.frombuffer(pixels, np.uint8).reshape(height, width, channels)
