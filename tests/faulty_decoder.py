"""A decoder with faults, at an image's own wish: what comes after the end of the image says which."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np

from model import decoder
from model.preprocess import Pixels

CRASH, HANG, SLEEP, EAT, TALK = FAULTS = b"!crash", b"!hang", b"!sleep", b"!eat", b"!talk"
SECONDS, PATIENCE = 1.0, 3.0


def work(data: bytes, task: dict[str, Any]) -> Pixels:
    if data.endswith(CRASH):
        os.kill(os.getpid(), signal.SIGSEGV)
    if data.endswith(HANG):
        while True:
            pass
    if data.endswith(SLEEP):
        time.sleep(3600)
    if data.endswith(EAT):
        eaten = []
        while True:
            eaten.append(bytearray(2**24))
    if data.endswith(TALK):
        return np.zeros((4096, 4096, 3), np.uint8)
    return decoder.work(data, task)


if __name__ == "__main__":
    decoder.main(work, SECONDS, PATIENCE)
