"""Two replicas behind Nginx: whatever happens to one of them, callers see no error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from model.artifact import HASHED, seal
from model.store import SHIPPED
from tests import live, nginx
from tests.faults.load import seconds_until, traffic
from tests.faults.server import API, classify, starts, workers
from tests.golden import SHIPPED_NAME

Say = Callable[[str], None]


class Replica:
    """One server on its own port, which can be stopped, killed, and started again with another model."""

    def __init__(self, home: Path, port: int) -> None:
        self.home, self.port = home, port
        self._running = ExitStack()

    def start(self, model: str) -> None:
        # Sized for two cores shared with a load generator and Nginx.
        env = live.environment(self.home, TOPOLOGY="embedded", RUNTIME="onnx-int8", WORKERS=1, MODEL=model)
        log = self.home / live.LOG
        command = [*live.command(self.port), "--timeout-graceful-shutdown", "30"]
        ready = partial(live.is_ready, f"http://127.0.0.1:{self.port}")
        process = self._running.enter_context(live.running(command, env, log, ready))
        (self.home / live.PID).write_text(str(process.pid))

    def stop(self) -> None:
        self._running.close()

    def kill(self) -> None:
        for pid in live.processes(self.home):
            os.kill(pid, signal.SIGKILL)
        self._running.close()


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[Replica]]:
    both = [Replica(tmp_path / f"replica-{i}", live.free_port()) for i in range(2)]
    with ExitStack() as stopping:
        for replica in both:
            stopping.callback(replica.stop)
            replica.start(SHIPPED_NAME)
        yield both


@pytest.fixture
def url(replicas: list[Replica], tmp_path: Path) -> Iterator[str]:
    """URL of Nginx in front of the replicas."""
    with nginx.before([replica.port for replica in replicas], live.free_port(), tmp_path) as url:
        yield url


@contextmanager
def beside(url: str, say: Say, what: str) -> Iterator[None]:
    """Run traffic during the block; not one request may fail."""
    with traffic(url) as sent:
        yield
    say(f"{what}: {sent}")
    assert sent.failed == 0


def served(url: str) -> set[str]:
    return {classify(url).json()["model"] for _ in range(8)}


def test_a_killed_replica_fails_no_request(replicas: list[Replica], url: str, say: Say) -> None:
    with beside(url, say, "replica killed and started again"):
        replicas[0].kill()
        time.sleep(3)
        replicas[0].start(SHIPPED_NAME)


def test_a_rolling_restart_fails_no_request(replicas: list[Replica], url: str, say: Say) -> None:
    with beside(url, say, "rolling restart"):
        for replica in replicas:
            replica.stop()
            replica.start(SHIPPED_NAME)


def other_version(home: Path) -> str:
    """Import another version of the shipped model into a replica's store: the same network with a different card."""
    folder = home / "other"
    shutil.copytree(SHIPPED, folder)
    card = json.loads((folder / "card.json").read_text())
    artifact = seal(folder, {**{key: value for key, value in card.items() if key != "files"}, "note": "upgrade"})
    assert all((folder / name).exists() for name in HASHED)
    subprocess.run(
        [*live.command(0)[:1], "-m", "model.store", "import", folder],
        cwd=live.REPOSITORY,
        env=live.environment(home),
        check=True,
        capture_output=True,
    )
    return artifact.tag


def test_upgrading_and_rolling_back_fail_no_request(replicas: list[Replica], url: str, say: Say) -> None:
    (old,) = served(url)
    (new,) = {other_version(replica.home) for replica in replicas}
    assert new != old
    for name, model in (("upgrade", new), ("rollback", old)):
        with beside(url, say, name):
            for replica in replicas:
                replica.stop()
                replica.start(model)
        assert served(url) == {model}


def test_killing_a_replicas_only_worker_fails_no_request(replicas: list[Replica], url: str, say: Say) -> None:
    """Requests wait at the socket of that replica, or go to the other one."""
    home = replicas[0].home
    with beside(url, say, "worker of a replica killed"):
        (worker,) = workers(home, API)
        os.kill(worker, signal.SIGKILL)
        seconds_until(lambda: starts(home, API) == 2, 30)
