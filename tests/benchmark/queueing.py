"""How long a request waits for a worker, given the arrival rate and the time it takes to serve one request.

A worker serves requests one after another, each in nearly the same time, and requests arrive independently: M/D/1.
Its mean wait has a closed form; its percentiles have no practical one and are simulated.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

ARRIVALS = 1_000_000
WARM_UP = ARRIVALS // 10
STEPS = 12
"""Bisection steps in the search for a utilisation: a resolution of 1 in 4,096."""


def waits(utilisation: float, services: NDArray[np.float64], gaps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Waiting time of each request in one queue, in mean service times; ``gaps`` and ``services`` have a mean of 1.

    Lindley's recursion, w[n+1] = max(0, w[n] + s[n] - g[n] / utilisation), as a random walk above its running minimum.
    """
    walk = np.concatenate([[0.0], np.cumsum(services - gaps / utilisation)])
    return (walk - np.minimum.accumulate(walk))[WARM_UP:]


@cache
def _gaps() -> NDArray[np.float64]:
    return np.random.default_rng(0).exponential(size=ARRIVALS)


def response(utilisation: float, quantile: float = 0.99) -> float:
    """That quantile of the response time (waiting plus service) in M/D/1, in service times."""
    return 1 + float(np.quantile(waits(utilisation, np.ones(ARRIVALS), _gaps()), quantile))


def highest_utilisation(limit: float, quantile: float = 0.99) -> float:
    """Highest with that quantile of the response within ``limit`` service times; 0 if an idle worker is slower."""
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if response(middle, quantile) <= limit else (low, middle)
    return low
