"""The supervisor of the worker processes, without workers. With them: test_faults.py and tests/faults."""

from __future__ import annotations

import ctypes
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.live import (
    LOG,
    REPOSITORY,
    STOP_SECONDS,
    command,
    environment,
    failed_start,
    family,
    free_port,
    is_ready,
    running,
    samples,
    serve,
)

LOOK_IN_MID_START = """
from circus.arbiter import Arbiter
from circus.util import synchronized
from serving.supervision import Supervisor

class Slow(Supervisor):
    def __init__(self):
        Arbiter.__init__(self, [], "tcp://127.0.0.1:0", "tcp://127.0.0.1:0")

    @synchronized("arbiter_start_watchers")
    def start(self):
        self.manage_watchers()

Slow().start()
"""


def test_checking_workers_during_their_start_is_no_error() -> None:
    """In a process of its own, because importing BentoML's modules prints warnings."""
    subprocess.run((sys.executable, "-c", LOOK_IN_MID_START), cwd=REPOSITORY, check=True, timeout=120)


def test_a_service_told_to_stop_while_starting_stops(tmp_path: Path) -> None:
    with (tmp_path / LOG).open("wb") as log:
        settings = environment(tmp_path, RUNTIME="onnx-int8", WORKERS=3)
        server = subprocess.Popen(command(free_port()), cwd=REPOSITORY, env=settings, stdout=log, stderr=log)
    while len(family(server.pid)) == 1 and server.poll() is None:
        time.sleep(0.001)
    server.send_signal(signal.SIGTERM)
    server.wait(STOP_SECONDS)
    assert "Traceback" not in (tmp_path / LOG).read_text()


def test_a_killed_server_leaves_no_worker_behind(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{(port := free_port())}"
    settings = environment(tmp_path, RUNTIME="onnx-int8", WORKERS=2, TOPOLOGY="runner")
    with running(command(port), settings, tmp_path / LOG, lambda: is_ready(url), stop=signal.SIGKILL) as server:
        assert len(family(server.pid)) > 3
    # Any surviving process would have been an error by now.


@pytest.mark.parametrize("topology", ["embedded", "runner"])
def test_a_server_that_stops_refuses_connections_while_it_answers_its_last_request(
    tmp_path: Path, topology: str
) -> None:
    """A connection that nobody accepts would keep a proxy waiting instead of sending it to another replica."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    settings = environment(tmp_path, RUNTIME="onnx-int8", WORKERS=2, TOPOLOGY=topology)
    with running(command(port), settings, tmp_path / LOG, lambda: is_ready(url)) as server:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as slow:
            slow.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\n")
            time.sleep(0.5)
            server.send_signal(signal.SIGTERM)
            time.sleep(2)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=30)
            slow.sendall(b"no image.")
            assert slow.recv(1000).startswith(b"HTTP/1.1 415 ")
        server.wait(STOP_SECONDS)


def test_a_server_stops_with_its_terminal_but_not_under_nohup(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{(port := free_port())}"
    settings = environment(tmp_path, RUNTIME="onnx-int8", WORKERS=1)
    with running(["nohup", *command(port)], settings, tmp_path / LOG, lambda: is_ready(url)) as server:
        server.send_signal(signal.SIGHUP)
        time.sleep(1)
        assert is_ready(url)
    with running(command(port), settings, tmp_path / LOG, lambda: is_ready(url)) as server:
        server.send_signal(signal.SIGHUP)
        assert server.wait(timeout=30) == 0


def test_a_long_path_for_temporary_files_does_not_stop_the_start(tmp_path: Path) -> None:
    temporary = tmp_path / ("x" * 100)
    temporary.mkdir()
    with serve("runner", tmp_path, TMPDIR=temporary, WORKERS=1):
        pass  # reached only if the server becomes ready


def test_a_port_that_needs_root_is_one_clear_line(tmp_path: Path) -> None:
    def drop_the_right_to_it() -> None:
        pr_capbset_drop, cap_net_bind_service = 24, 10
        ctypes.CDLL(None).prctl(pr_capbset_drop, cap_net_bind_service)  # fails for who has no such right anyway

    printed = failed_start(tmp_path, 81, drop_the_right_to_it)
    assert printed[-1] == "error: port 81 is reserved for root; expected one that this user may open"


def test_a_port_in_use_is_one_clear_line_and_does_not_disturb_its_server(tmp_path: Path) -> None:
    with serve("embedded", tmp_path, WORKERS=1) as url:
        port = int(url.rpartition(":")[2])
        before = samples(url)
        assert failed_start(tmp_path, port)[-1] == f"error: port {port} is in use; expected a free one"
        assert {name for name in before if name.startswith("classifier_")} <= samples(url).keys()
        (folder,) = (path for path in (tmp_path / "prometheus_multiproc_dir").iterdir() if path.is_dir())
    assert not folder.exists()
