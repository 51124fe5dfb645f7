"""The processes that decode for ``model.sandbox``; they are native code on bytes of strangers, and may die of it.

    python -m model.decoder MAX_PIXELS    with a socket as standard input

A fork server: for each byte that it receives it forks, and sends back a socket to the new decoder. It has imported
everything and never sees an image, so that the next decoder is there within milliseconds of the death of one. A decoder
answers one image after another until its socket is closed. It may compute for ``SECONDS`` on each, last ``PATIENCE``
and take ``memory_for`` its largest image in all; the kernel ends what takes more.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import cv2
import orjson
from PIL import Image

from model.headers import ImageError, TooManyPixelsError, UnsupportedFormatError, read_header
from model.preprocess import MAX_PIXELS, Pixels, render, shrink

SECONDS = 5.0
"""Processor time for one image, more where ``MAX_PIXELS`` is raised: the largest takes 3 on a slow processor."""
PATIENCE = 2 * SECONDS
"""Wall-clock time for one image, on a machine with other work."""
BASE_MEMORY = 128 * 2**20
"""Bytes of a decoder before any image: the interpreter and the libraries, and something to spare."""
PIXEL_MEMORY = 8
"""Bytes for each pixel of an opaque image; a GIF takes the most."""
ERRORS = {error.__name__: error for error in (ImageError, TooManyPixelsError, UnsupportedFormatError)}
Work = Callable[[bytes, dict[str, Any]], Pixels]
"""Takes an encoded image and a task, and returns pixels."""


def memory_for(max_pixels: int) -> int:
    """Bytes that a decoder may take, of images of up to ``max_pixels``."""
    return BASE_MEMORY + PIXEL_MEMORY * max_pixels


def work(data: bytes, task: dict[str, Any]) -> Pixels:
    """A task is ``{"size": [height, width]}`` or ``{"longest": pixels}``."""
    header = read_header(data)
    return render(data, header, tuple(task["size"])) if "size" in task else shrink(data, header, task["longest"])


def main(work: Work = work, seconds: float = SECONDS, patience: float = PATIENCE) -> None:
    """Fork a decoder that does ``work`` for each byte received, until the worker has gone."""
    max_pixels = int(sys.argv[1])
    memory, slower = memory_for(max_pixels), max(1, max_pixels / MAX_PIXELS)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks what a decoder died of: the kernel may forget it
    for stop in (signal.SIGINT, signal.SIGTERM):  # to the whole group: what the worker has accepted is still decoded
        signal.signal(stop, signal.SIG_IGN)
    cv2.setNumThreads(1)
    Image.init()  # all that Pillow would import with the first image
    control = socket.socket(fileno=0)
    while control.recv(1):
        ours, theirs = socket.socketpair()
        if os.fork() == 0:
            control.close()
            ours.close()
            _decode(Connection(theirs.detach()), work, memory, seconds * slower, patience * slower)
        socket.send_fds(control, [b"\0"], [ours.fileno()])
        ours.close()
        theirs.close()


def _decode(connection: Connection, work: Work, memory: int, seconds: float, patience: float) -> None:
    """Answer until the worker has gone; never returns."""
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # which would hold somebody's image
        while True:
            task, data = orjson.loads(connection.recv_bytes()), connection.recv_bytes()
            _limit_time(seconds, patience)
            answer, pixels = _attempt(work, data, task)
            _limit_time(0, 0)
            connection.send_bytes(orjson.dumps(answer))
            connection.send_bytes(pixels)
    finally:
        os._exit(0)  # past everything that the fork server would do at its own end


def _limit_time(computing: float, passing: float) -> None:
    """Nothing handles the signals of these timers, so that the process ends."""
    signal.setitimer(signal.ITIMER_PROF, computing)
    signal.setitimer(signal.ITIMER_REAL, passing)


def _attempt(work: Work, data: bytes, task: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    try:
        pixels = work(data, task)
        return {"shape": pixels.shape}, pixels.tobytes()
    except ImageError as error:
        return {"error": type(error).__name__, "message": str(error)}, b""


if __name__ == "__main__":
    main()
