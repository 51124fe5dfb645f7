"""A decoder that fails on demand: the bytes after the end of the image select the fault."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np

from model import decoder
from model.headers import ImageError
from model.preprocess import Pixels

CRASH, HANG, SLEEP, STOP, EAT, TALK = b"!crash", b"!hang", b"!sleep", b"!stop", b"!eat", b"!talk"
OTHER_SHAPE, MORE_AXES, OTHER_ERROR = b"!shape", b"!axes", b"!error"
FAULTS = CRASH, HANG, SLEEP, STOP, EAT, TALK, OTHER_SHAPE, MORE_AXES, OTHER_ERROR


class UnknownError(ImageError):
    """An error that is not part of the protocol between the service and its decoder."""


CPU_SECONDS, WALL_SECONDS = 1.0, 3.0


def work(data: bytes, task: dict[str, Any]) -> Pixels:
    if data.endswith(CRASH):
        os.kill(os.getpid(), signal.SIGSEGV)
    if data.endswith(HANG):
        while True:
            pass
    if data.endswith(SLEEP):
        time.sleep(3600)
    if data.endswith(STOP):
        os.kill(os.getpid(), signal.SIGSTOP)
    if data.endswith(EAT):
        eaten = []
        while True:
            eaten.append(bytearray(2**24))
    if data.endswith(TALK):
        return np.zeros((4096, 4096, 3), np.uint8)
    if data.endswith(OTHER_ERROR):
        raise UnknownError
    pixels = decoder.work(data, task)
    if data.endswith(OTHER_SHAPE):
        return pixels.reshape(2 * len(pixels), -1, 3)
    return pixels[None] if data.endswith(MORE_AXES) else pixels


if __name__ == "__main__":
    decoder.main(work, CPU_SECONDS, WALL_SECONDS)
