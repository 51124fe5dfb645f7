"""Graceful shutdown: on SIGTERM readiness goes off first, and the server stops accepting some time later.

In between, requests are answered as before, and each reply asks its client to open a new connection next time, which a
load balancer that has noticed the readiness opens elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from types import FrameType

logger = logging.getLogger("classifier.draining")

started = threading.Event()
"""Set from SIGTERM on. A process is told to stop once."""
_disabled = threading.Event()


def install(seconds: float) -> None:
    """Postpone by ``seconds`` what SIGTERM does to this process, whose event loop is running."""
    stop = signal.getsignal(signal.SIGTERM)
    assert callable(stop)
    loop = asyncio.get_running_loop()

    def begin(number: int, frame: FrameType | None) -> None:
        if _disabled.is_set():
            started.set()
            stop(number, frame)
        elif not started.is_set():
            started.set()
            loop.call_soon_threadsafe(loop.call_later, seconds, stop, number, None)
            logger.info("draining", extra={"seconds": seconds})

    signal.signal(signal.SIGTERM, begin)


def exit_after(seconds: float) -> threading.Timer:
    """End this process after ``seconds``, whatever its other threads do; join the timer to do nothing until then."""
    end = threading.Timer(seconds, os._exit, (1,))
    end.daemon = True
    end.start()
    return end


def disable() -> None:
    """Make the next SIGTERM stop this process at once; may be called from any thread.

    For a process that cannot answer: while draining it would go on taking connections that other workers could serve.
    """
    _disabled.set()
