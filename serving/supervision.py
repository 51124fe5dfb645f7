"""What BentoML's supervisor of the worker processes (circus) leaves out for a service that heals and stops by itself.

- It looks for dead workers every 10 s, and in a container replaces none until all are dead: here, within a second.
- Told to stop, it stops the runner together with the workers that still ask it: here, the runner goes last.
- Meanwhile it keeps a port open on which nobody accepts: here, a proxy is refused at once and turns to another replica.
- A second server with the same home empties the metrics of the first: here, each has a folder of its own.
- Any user of the machine may command it, over a TCP port: here, over a socket in a private folder.
- Killed, it leaves its workers behind, which keep the port: here, they stop.
- It does not start where the driver of a GPU does not answer, even without need of it: here, there is no GPU then.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import shutil
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from _bentoml_impl.server.serving import API_SERVER_NAME
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.resource import NvidiaGpuResource
from bentoml._internal.utils import circus
from circus.arbiter import Arbiter
from circus.exc import ConflictError
from circus.watcher import Watcher

from model.runtimes import cuda_devices

CHECK_SECONDS = 0.5
PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""
WORKERS = "service"
"""BentoML's name for the watcher of the API workers; those of runners are called otherwise."""


class Supervisor(circus.Arbiter):
    def __init__(self, watchers: list[Watcher], **options: Any) -> None:
        self._end: asyncio.Task[None] | None = None
        for watcher in watchers:
            watcher.respawn = True
        folder = tempfile.mkdtemp(prefix="classifier-")
        endpoints = {name: f"ipc://{folder}/{name}" for name in ("endpoint", "pubsub_endpoint")}
        super().__init__(watchers, **{**options, **endpoints, "check_delay": CHECK_SECONDS})
        for mine in (folder, _metrics_folder()):
            self.exit_stack.callback(shutil.rmtree, mine, ignore_errors=True)

    def start(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().start(*arguments, **options)
        except OSError as error:
            self.exit_stack.close()
            if error.errno != errno.EADDRINUSE:
                raise
            sys.exit(f"error: port {self.sockets[API_SERVER_NAME].port} is in use; expected a free one")

    def manage_watchers(self) -> Any:
        """Look for dead workers; not while it is at something else, such as a start that takes longer than that."""
        with suppress(ConflictError):
            return super().manage_watchers()

    def stop(self) -> Any:
        if self._end is None:
            self._end = asyncio.ensure_future(self._stop())
        return self._end

    async def _stop(self) -> None:
        # A signal in mid-start would be lost otherwise: circus does one thing at a time, and refuses others.
        while self._exclusive_running_command:  # noqa: ASYNC110  # it has no event for the end of it
            await asyncio.sleep(CHECK_SECONDS / 10)
        self.sockets[API_SERVER_NAME].close()
        (workers,) = (watcher for watcher in self.watchers if watcher.name == WORKERS)
        runners = [watcher for watcher in self.watchers if watcher is not workers]
        for runner in runners:
            runner.hooks["before_signal"] = _hold
        workers.hooks["after_stop"] = lambda **_: _release(runners)
        # Not BentoML's own, which begins by removing the runner's socket.
        await Arbiter.stop(self)
        self.exit_stack.close()


def _hold(**_: Any) -> bool:
    """Answers circus that the signal is not to be sent."""
    return False


def _release(runners: list[Watcher]) -> None:
    for runner in runners:
        del runner.hooks["before_signal"]
        for pid in list(runner.processes):
            runner.send_signal(pid, signal.SIGTERM)


def _metrics_folder() -> Path:
    # In each container that shares the home this is process 1.
    server = f"{socket.gethostname()}-{os.getpid()}"
    return Path(BentoMLContainer.bentoml_home.get(), "prometheus_multiproc_dir", server)


def _usable_gpus() -> list[int]:
    return list(range(cuda_devices()))


def follow() -> None:
    """Let this worker stop, as by SIGTERM, when the supervisor ends without having told it to."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def install() -> None:
    """Let ``bentoml serve`` in this process, which has not started any worker yet, use ``Supervisor``.

    BentoML empties the folder of the metrics at its start: that of each server is its own.
    """
    BentoMLContainer.prometheus_multiproc_dir.set(str(_metrics_folder()))
    NvidiaGpuResource.from_system = _usable_gpus  # type: ignore[method-assign, assignment]
    circus.Arbiter = Supervisor  # type: ignore[misc]  # the name under which BentoML looks it up
