"""What BentoML's process supervisor (circus) lacks for a service that recovers and stops by itself.

- It checks for dead workers every 10 s, and in a container replaces none until all are dead: here, within a second.
- On shutdown it stops the runner together with the workers that still call it: here, the runner goes last.
- Meanwhile it keeps a port open that nobody accepts on, and so does the runner, which inherits it: here, a proxy is
  refused at once and tries another replica.
- A second server with the same home empties the first one's metrics: here, each has its own folder.
- Any user of the machine can control it over a TCP port: here, over a socket in a private folder.
- When killed, it leaves its workers behind, holding the port: here, they stop.
- It reloads on SIGHUP, so that it outlives its terminal: here, it stops then, or goes on under ``nohup``.
- It does not start if the path in ``TMPDIR`` is long, as on clusters: here, its sockets are in /tmp then.
- It does not start if a GPU's driver does not answer, even if no GPU is needed: here, that counts as no GPU.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import shutil
import signal
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from _bentoml_impl.server.serving import API_SERVER_NAME
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.resource import NvidiaGpuResource
from bentoml._internal.utils import circus
from circus.arbiter import Arbiter
from circus.exc import ConflictError
from circus.sighandler import SysHandler
from circus.watcher import Watcher

from model.gpus import cuda_devices

CHECK_SECONDS = 0.5
PR_SET_PDEATHSIG = 1
"""From prctl(2)."""
WORKERS = "service"
"""BentoML's name for the watcher of the API workers; those of the runners have other names."""
MAX_TEMPORARY = 60
"""Longest path, in bytes, of a folder for temporary files that holds BentoML's sockets: they lie in folders of their
own, and the path of a socket is limited to 107 bytes (unix(7)), by BentoML to 102."""


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
            port = self.sockets[API_SERVER_NAME].port
            if error.errno == errno.EADDRINUSE:
                sys.exit(f"error: port {port} is in use; expected a free one")
            if error.errno == errno.EACCES:
                sys.exit(f"error: port {port} is reserved for root; expected one that this user may open")
            raise

    def manage_watchers(self) -> Any:
        """Check for dead workers, unless circus is busy with something else, such as a slow start."""
        with suppress(ConflictError):
            return super().manage_watchers()

    def stop(self) -> Any:
        if self._end is None:
            self._end = asyncio.ensure_future(self._stop())
        return self._end

    async def _stop(self) -> None:
        # Otherwise a signal during the start would be lost: circus does one thing at a time and refuses others.
        while self._exclusive_running_command:  # noqa: ASYNC110  # circus has no event for its end
            await asyncio.sleep(CHECK_SECONDS / 10)
        self.sockets[API_SERVER_NAME].close()
        (workers,) = (watcher for watcher in self.watchers if watcher.name == WORKERS)
        runners = [watcher for watcher in self.watchers if watcher is not workers]
        for runner in runners:
            runner.hooks["before_signal"] = _hold
        workers.hooks["after_stop"] = lambda **_: _release(runners)
        # Not BentoML's own ``stop``, which begins by removing the runner's socket.
        await Arbiter.stop(self)
        self.exit_stack.close()


def _hold(**_: Any) -> bool:
    """Tell circus not to send the signal."""
    return False


def _release(runners: list[Watcher]) -> None:
    for runner in runners:
        del runner.hooks["before_signal"]
        for pid in list(runner.processes):
            runner.send_signal(pid, signal.SIGTERM)


def _metrics_folder() -> Path:
    # The process id is not enough: in each container that shares the home it is 1.
    server = f"{socket.gethostname()}-{os.getpid()}"
    return Path(BentoMLContainer.bentoml_home.get(), "prometheus_multiproc_dir", server)


def _usable_gpus() -> list[int]:
    return list(range(cuda_devices()))


def follow() -> None:
    """Have this worker sent SIGTERM when the supervisor dies without having stopped it, and keep only its own socket.

    A worker inherits the sockets of all services. The runner, which stops last, would hold the port open until then.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    own = int(sys.argv[sys.argv.index("--fd") + 1])
    for descriptor in _listening():
        if descriptor != own:
            os.close(descriptor)


def _listening() -> Iterator[int]:
    """The descriptors of this process on which connections can arrive."""
    for descriptor in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        with suppress(OSError):  # the one that listed the folder
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as copy:
                    is_listening = copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if is_listening:
                    yield descriptor


def install() -> None:
    """Make ``bentoml serve`` in this process use ``Supervisor``; call it before any worker starts.

    BentoML empties the metrics folder at startup, so each server gets its own.
    """
    BentoMLContainer.prometheus_multiproc_dir.set(str(_metrics_folder()))
    NvidiaGpuResource.from_system = _usable_gpus  # type: ignore[method-assign, assignment]
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    SysHandler.handle_hup = (lambda handler: None) if is_ignored else SysHandler.handle_term  # type: ignore[method-assign]
    if len(os.fsencode(tempfile.gettempdir())) > MAX_TEMPORARY:
        tempfile.tempdir = "/tmp"  # noqa: S108  # only a folder of our own is made there, by mkdtemp
    circus.Arbiter = Supervisor  # type: ignore[misc]  # the name under which BentoML looks it up
