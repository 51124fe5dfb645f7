"""The soak judges by its samples, and can fail."""

from __future__ import annotations

from typing import Any

import pytest

from tests import soak
from tests.benchmark import openloop


def samples(
    mib: float = 0.0, descriptors: float = 0.0, outcome: str = "415", replaced: bool = False
) -> list[dict[str, Any]]:
    """A hundred samples, with a warm-up. The first two arguments are the growth from one to the next."""
    return [
        {
            "outcomes": {"200": 98, outcome if i == 70 else "400": 2},
            "processes": {
                "1": {"mib": 50, "descriptors": 20},
                "9" if replaced and i > 50 else "2": {
                    "mib": (100 if i > 5 else 20) + mib * i,
                    "descriptors": round(30 + descriptors * i),
                },
            },
        }
        for i in range(100)
    ]


def test_flat_samples_pass() -> None:
    assert list(soak.objections(samples())) == []
    assert list(soak.objections(samples(mib=0.05))) == []


@pytest.mark.parametrize(
    ("changed", "objection"),
    [
        ({"mib": 0.2}, "memory has grown by"),
        ({"descriptors": 0.03}, "descriptors have grown by"),
        ({"outcome": "500"}, "some were answered 500"),
        ({"outcome": "connection lost"}, "some were answered connection lost"),
        ({"replaced": True}, "a process was replaced"),
    ],
)
def test_growth_and_failures_are_reported(changed: dict[str, Any], objection: str) -> None:
    (found,) = soak.objections(samples(**changed))
    assert found.startswith(objection)


def test_no_window_repeats_the_previous_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens at that address: only the number of requests due matters."""
    monkeypatch.setattr(soak, "WINDOW_SECONDS", 1.0)
    monkeypatch.setattr(soak, "DEADLINE", 0.5)
    offered = [soak.window("http://127.0.0.1:9", 200, 0, number)["offered"] for number in (0, 1, 1)]
    assert offered[0] == len(openloop.arrivals(200, 1.0))
    assert offered[0] != offered[1] == offered[2]


def test_one_request_in_fifty_is_broken() -> None:
    sent = soak.bodies()
    assert len(sent) == 100
    assert len({body.content for body in sent}) == len(soak.workloads.IMAGES) + 2
