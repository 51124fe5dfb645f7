"""Each worker's heartbeat metric, and what remains of it when a worker stops or dies; the alert is in monitoring/."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

from serving.heartbeat import BEAT_SECONDS
from tests.live import START_SECONDS, Server, await_workers, samples, serve

SERIES = re.compile(r'classifier_worker_alive_timestamp_seconds\{pid="(\d+)",process="(.+)"\}')
Beats = dict[str, tuple[int, float]]
"""By worker name in the logs: its process id and the time it last reported."""


def beats(url: str) -> Beats:
    found = ((SERIES.fullmatch(series), told) for series, told in samples(url).items())
    return {match[2]: (int(match[1]), told) for match, told in found if match}


def beats_when(url: str, condition: Callable[[Beats], bool]) -> Beats:
    deadline = time.monotonic() + START_SECONDS
    while not condition(told := beats(url)):
        assert time.monotonic() < deadline, told
        time.sleep(0.2)
    return told


def test_every_worker_reports_a_heartbeat_without_any_request(server: Server) -> None:
    await_workers(server.home)
    told = beats(server.url)
    assert told.keys() == {"api-1", "api-2"} | ({"runner-1"} if server.topology == "runner" else set())
    assert all(time.time() - at < 3 * BEAT_SECONDS for _, at in told.values())
    assert samples(server.url)["classifier_workers"] == 2


def test_a_stopped_worker_falls_silent_and_a_dead_one_leaves_nothing(tmp_path: Path) -> None:
    with serve("embedded", tmp_path, WORKERS=2) as url:
        await_workers(tmp_path)
        (stopped, _), (other, _) = (beats(url)[name] for name in ("api-2", "api-1"))
        os.kill(stopped, signal.SIGSTOP)
        last = beats(url)
        later = beats_when(url, lambda told: told["api-1"][1] > last["api-1"][1] + BEAT_SECONDS)
        assert later["api-2"] == last["api-2"]
        os.kill(stopped, signal.SIGKILL)
        replaced = beats_when(url, lambda told: told.get("api-2", last["api-2"])[0] != stopped)
        assert replaced.keys() == {"api-1", "api-2"}
        assert replaced["api-1"][0] == other
        left = [name for name in samples(url) if name.startswith("classifier_worker_alive_timestamp")]
        assert len(left) == 2, "of the dead there is none"
