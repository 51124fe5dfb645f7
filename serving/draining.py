"""Stopping without losing a request: on SIGTERM readiness goes off first, and the door closes some time later.

In between every request is answered as before, and each reply asks its client for a new connection the next time, which
a load balancer that has seen the readiness opens elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from types import FrameType

logger = logging.getLogger("classifier.draining")

begun = threading.Event()
"""Set from the signal on. A process is told to stop once."""
_hopeless = threading.Event()


def install(seconds: float) -> None:
    """Postpone by ``seconds`` what this process, whose event loop is running, does on SIGTERM."""
    stop = signal.getsignal(signal.SIGTERM)
    assert callable(stop)
    loop = asyncio.get_running_loop()

    def begin(number: int, frame: FrameType | None) -> None:
        if _hopeless.is_set():
            begun.set()
            stop(number, frame)
        elif not begun.is_set():
            begun.set()
            loop.call_soon_threadsafe(loop.call_later, seconds, stop, number, None)
            logger.info("draining", extra={"seconds": seconds})

    signal.signal(signal.SIGTERM, begin)


def exit_after(seconds: float) -> threading.Timer:
    """End this process then, whatever its other threads do; join the timer to do nothing until then."""
    end = threading.Timer(seconds, os._exit, (1,))
    end.daemon = True
    end.start()
    return end


def skip() -> None:
    """Let the next SIGTERM stop this process at once; from any thread.

    It cannot answer, and meanwhile would go on to take connections that other workers could serve.
    """
    _hopeless.set()
