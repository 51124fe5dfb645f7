"""Decoder processes for ``model.sandbox``: they run native code on untrusted bytes, and may crash on them.

    python -m model.decoder MAX_PIXELS    with a socket as standard input

A fork server: at each ``FORK`` that it receives it forks, and sends back a socket to the new decoder; at ``END`` it
kills that decoder. It has imported everything and never sees an image, so a dead decoder is replaced within
milliseconds. A decoder answers one image after another. Each image may take ``CPU_SECONDS`` of processor time and
``WALL_SECONDS`` of wall-clock time, and the decoder as much memory as ``memory_for`` allows; the kernel enforces all
three. The worker's socket has a timeout as well: a decoder may be stopped, or an image that has taken it over may
disarm its timers.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import cv2
import orjson
from PIL import Image

from model.headers import ImageError, TooManyPixelsError, UnsupportedFormatError, read_header
from model.preprocess import MAX_PIXELS, Pixels, render, shrink

FORK, END = b"f", b"e"
"""Orders to the fork server. It has one decoder at a time."""
CPU_SECONDS = 5.0
"""Processor time for one image, scaled up with ``MAX_PIXELS``; the largest takes 3 on a slow processor."""
WALL_SECONDS = 2 * CPU_SECONDS
"""Wall-clock time for one image, on a machine that has other work to do."""
GRACE_SECONDS = 1
"""Time beyond ``WALL_SECONDS`` for which a worker waits for its decoder to read or write."""
BASE_MEMORY = 128 * 2**20
"""Bytes of a decoder before any image: the interpreter, the libraries and some slack."""
PIXEL_MEMORY = 8
"""Bytes per pixel of an opaque image; a GIF takes the most."""
ERRORS = {error.__name__: error for error in (ImageError, TooManyPixelsError, UnsupportedFormatError)}
Work = Callable[[bytes, dict[str, Any]], Pixels]
"""Takes an encoded image and a task, and returns pixels."""


def memory_for(max_pixels: int) -> int:
    """Bytes that a decoder of images of up to ``max_pixels`` may take."""
    return BASE_MEMORY + PIXEL_MEMORY * max_pixels


def work(data: bytes, task: dict[str, Any]) -> Pixels:
    """Render or shrink ``data``: a task is ``{"size": [height, width]}`` or ``{"longest": pixels}``."""
    header = read_header(data)
    return render(data, header, tuple(task["size"])) if "size" in task else shrink(data, header, task["longest"])


def main(work: Work = work, cpu_seconds: float = CPU_SECONDS, wall_seconds: float = WALL_SECONDS) -> None:
    """Fork decoders that do ``work``, and kill them, as ordered, until the worker has gone."""
    max_pixels = int(sys.argv[1])
    memory, slower = memory_for(max_pixels), max(1, max_pixels / MAX_PIXELS)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the caller may ignore it: dead decoders would lose their ids
    for stop in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; accepted images are still decoded
        signal.signal(stop, signal.SIG_IGN)
    cv2.setNumThreads(1)
    Image.init()  # imports what Pillow would otherwise import with the first image
    patience = struct.pack("ll", math.ceil(wall_seconds * slower) + GRACE_SECONDS, 0)  # a struct timeval
    control = socket.socket(fileno=0)
    decoder = 0
    while order := control.recv(1):
        if order == END:
            _kill(decoder)
            decoder = 0
            continue
        ours, theirs = socket.socketpair()
        for limit in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, limit, patience)
        decoder = os.fork()
        if decoder == 0:
            control.close()
            ours.close()
            _decode(Connection(theirs.detach()), work, memory, cpu_seconds * slower, wall_seconds * slower)
        socket.send_fds(control, [b"\0"], [ours.fileno()])
        ours.close()
        theirs.close()
    _kill(decoder)


def _kill(decoder: int) -> None:
    """Kill a decoder, unless 0. If it is dead already, nothing else has its id before it is reaped here."""
    if decoder:
        os.kill(decoder, signal.SIGKILL)
        os.waitpid(decoder, 0)


def _decode(connection: Connection, work: Work, memory: int, cpu_seconds: float, wall_seconds: float) -> None:
    """Decode image after image until the worker has gone; never returns."""
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would contain a user's image
        while True:
            task, data = orjson.loads(connection.recv_bytes()), connection.recv_bytes()
            _limit_time(cpu_seconds, wall_seconds)
            answer, pixels = _attempt(work, data, task)
            _limit_time(0, 0)
            connection.send_bytes(orjson.dumps(answer))
            connection.send_bytes(pixels)
    finally:
        os._exit(0)  # skips the exit handlers inherited from the fork server


def _limit_time(cpu_seconds: float, wall_seconds: float) -> None:
    """Arm both timers, or disarm them with 0. Nothing handles their signals, so they end the process."""
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)


def _attempt(work: Work, data: bytes, task: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    try:
        pixels = work(data, task)
        return {"shape": pixels.shape}, pixels.tobytes()
    except ImageError as error:
        return {"error": type(error).__name__, "message": str(error)}, b""


if __name__ == "__main__":
    main()
