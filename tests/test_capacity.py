"""The queueing model behind docs/capacity.md, compared with closed-form results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.benchmark import capacity
from tests.benchmark.queueing import ARRIVALS, highest_utilisation, response, waits
from tests.benchmark.results import EMBEDDED, ONE_WORKER, Results


def draws(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).exponential(size=ARRIVALS)


@pytest.mark.parametrize("utilisation", [0.3, 0.7, 0.9])
def test_the_simulation_agrees_with_pollaczek_khinchine(utilisation: float) -> None:
    simulated = waits(utilisation, np.ones(ARRIVALS), draws(1)).mean()
    assert simulated == pytest.approx(utilisation / (2 * (1 - utilisation)), rel=0.05)


@pytest.mark.parametrize("utilisation", [0.5, 0.8])
def test_with_exponential_service_times_it_agrees_with_m_m_1(utilisation: float) -> None:
    """P(W > t) = utilisation * exp(-(1 - utilisation) t)."""
    waited = waits(utilisation, draws(1), draws(2))
    assert (waited > 1e-9).mean() == pytest.approx(utilisation, rel=0.02)
    for time in (1.0, 5.0):
        assert (waited > time).mean() == pytest.approx(utilisation * np.exp(-(1 - utilisation) * time), rel=0.05)


def test_the_highest_utilisation_just_meets_its_limit() -> None:
    assert highest_utilisation(0.5) == 0  # a service alone takes longer
    found = highest_utilisation(20.0)
    assert 0.8 < found < 1
    assert response(found) <= 20 < response(found + 0.01)


def record(name: str, rate: float, p99: float) -> dict[str, Any]:
    """``p99`` is that of the open loop at half the best rate."""
    run = {"workload": "small", "replies": 100, "errors": 0, "p50": 0.002, "p95": 0.003, "p99": 0.004}
    closed = [run | {"connections": c, "rate": r, "images_per_second": r} for c, r in ((1, rate / 3), (64, rate))]
    closed.append(closed[-1] | {"workload": "photographs", "images_per_second": rate / 19})
    opened = [{"factor": 0.5, "offered": rate / 2, "good": rate / 2, "p50": 0.003, "p99": p99, "outcomes": {"200": 9}}]
    return {"name": name, "kind": "bundle", "closed": closed, "open": opened, "versions": {}}


def results(p99: float = 0.01) -> Results:
    records = [record(ONE_WORKER, 1000.0, 0.01), record(EMBEDDED, 1900.0, p99)]
    return Results({"records": records, "options": {"deadline": "1"}, "ceiling": {}, "cores": 2, "processor": "a"})


def test_replicas_and_cost_follow_from_one_workers_rate() -> None:
    worker = capacity.Worker.of(results(), 1900)
    assert worker.rate == pytest.approx(950)  # its neighbour costs it a little
    wanted = 10_000 / (worker.utilisation * 950)
    assert worker.replicas(10_000) == int(wanted) + 2  # rounded up, plus one spare
    assert capacity.cost_per_million(12, 10_000, price=0.036) == pytest.approx(12 * 0.036 / 3600 / 10_000 * 1e6)


def test_no_worker_is_planned_busier_than_was_measured() -> None:
    """The model alone would allow more than 90 % utilisation."""
    assert capacity.Worker.of(results(), 1900).utilisation == 0.5
    assert capacity.Worker.of(results(p99=0.101), 1900).utilisation == 0


def test_larger_images_use_the_corrected_model_at_their_own_rate() -> None:
    large = capacity.Worker.of(results(), 100)
    assert large.rate == 50
    assert 0 < large.utilisation < 0.5
    predicted = large.elsewhere + response(large.utilisation) / 50
    corrected = predicted * 0.01 / (0.002 - 1 / 1000 + response(0.5) / 1000)  # measured p99 / modelled p99
    assert corrected == pytest.approx(capacity.OBJECTIVE, rel=0.01)


def test_an_objective_that_no_utilisation_meets_has_no_replicas() -> None:
    assert capacity.Worker.of(results(), 10).replicas(100) is None  # even an idle worker takes 200 ms
    assert "| 1,000,000 | - | - |" in capacity.page(results(p99=0.101), price=0.05)


def test_the_page_shows_the_figures_and_the_check_of_the_model() -> None:
    page = capacity.page(results(), price=0.05)
    assert "1,000,000" in page
    assert "| 1 | 50% | 500 |" in page
    assert "| 2 | 50% | 950 |" in page
    assert "1.90" in page  # two workers compared with one
