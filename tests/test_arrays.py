"""Arrays exchanged between a worker and the runner arrive unchanged or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.arrays import SHAPE, pack, unpack

PIXELS = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)


@pytest.mark.parametrize(
    "array", [PIXELS, PIXELS[:, ::-1, 1:], PIXELS[:1], np.array([[np.nan, -0.0, 1e-30]], np.float32)]
)
def test_an_array_round_trips_bit_for_bit(array: NDArray[Any]) -> None:
    body, headers = pack(array)
    back = unpack(body, headers[SHAPE], array.dtype)
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()
    back[...] = 0  # torch requires writable memory


@pytest.mark.parametrize("shape", ["2,4,5,2", "2,4,5,4", "", "2,four"])
def test_a_body_that_does_not_match_its_shape_is_refused(shape: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        unpack(PIXELS.tobytes(), shape, np.uint8)
