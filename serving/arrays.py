"""Arrays between an API worker and the runner: raw bytes, with the shape in a header.

BentoML's own clients would pickle them, and its server would build a JSON schema for every reply.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

SHAPE = "x-shape"


def pack(array: NDArray[Any]) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a message that carries ``array``; both sides know its dtype."""
    return array.tobytes(), {SHAPE: ",".join(map(str, array.shape))}


def unpack(body: bytes, shape: str, dtype: DTypeLike) -> NDArray[Any]:
    """The array of a message, in memory of its own; raises ``ValueError`` if body and shape disagree."""
    return np.frombuffer(bytearray(body), dtype).reshape([int(side) for side in shape.split(",")])
