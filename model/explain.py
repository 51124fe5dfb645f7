"""Explanations: which parts of an image a verdict comes from."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from model.artifact import Evidence
from model.preprocess import Pixels, resize

Heat = NDArray[np.float32]
"""(H, W), zero or more, with a sum of 1."""
SHIFTS = (-0.25, -0.125, 0.0, 0.125, 0.25)
"""Shifts of the views along each axis, as shares of the image's side."""
VIEWS = len(SHIFTS) ** 2
MIN_SIDE, MAX_SIDE = 256, 1024
"""Limits on the longer side of an overlay, in pixels."""


def views(image: Pixels) -> Pixels:
    """(H, W, 3) to (VIEWS, H, W, 3): the image shifted by each pair of ``SHIFTS``, its border repeated."""
    height, width = image.shape[:2]
    shown = _view_indices(height, width)
    return np.stack([image[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)] for rows, columns in shown])


def evidence_map(evidence: Evidence, class_index: int, size: tuple[int, int], stride: int) -> Heat:
    """(VIEWS, h, w, K) evidence of the ``views`` to one map (H, W) for a class: non-negative, with a sum of 1.

    The network's own grid is coarse, a cell for every ``stride`` pixels; shifting the image under it and averaging the
    results gives a finer one. Where pooling drops the last rows of an image, other views cover them. Only what a place
    adds beyond the mean of all classes counts: softmax cancels the rest.
    """
    height, width = (min(side, stride * cells) for side, cells in zip(size, evidence.shape[1:3], strict=True))
    total, seen = np.zeros(size, np.float32), np.zeros(size, np.float32)
    contrast = evidence[..., class_index] - evidence.mean(axis=-1)
    for grid, (rows, columns) in zip(contrast, _view_indices(*size), strict=True):
        kept_rows, kept_columns = _inside(rows[:height], size[0]), _inside(columns[:width], size[1])
        places = np.ix_(rows[kept_rows], columns[kept_columns])
        fine = cv2.resize(grid, (stride * grid.shape[1], stride * grid.shape[0]))
        total[places] += fine[np.ix_(kept_rows, kept_columns)]
        seen[places] += 1
    positive = np.maximum(total / np.maximum(seen, 1), 0)
    return np.asarray(positive / max(float(positive.sum()), 1e-12), np.float32)


def overlay(image: Pixels, heat: Heat) -> bytes:
    """PNG of ``image`` (H, W, 3) under an evidence map, scaled for viewing; it is bright where the evidence lies."""
    longer = max(image.shape[:2])
    scale = min(max(longer, MIN_SIDE), MAX_SIDE) / longer
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    visible = resize(image, (height, width))
    relative = heat / max(float(heat.max()), 1e-12)
    share = cv2.resize(relative, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    colours = cv2.applyColorMap((255 * share).astype(np.uint8), cv2.COLORMAP_INFERNO)
    weight = (0.25 + 0.5 * share)[..., None]
    blended = (1 - weight) * visible[..., ::-1] + weight * colours
    _, encoded = cv2.imencode(".png", blended.astype(np.uint8))
    return encoded.tobytes()


def _view_indices(height: int, width: int) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """For each view, the rows and columns of the image that it shows; some lie outside the image."""
    rows, columns = np.arange(height), np.arange(width)
    return [(rows + round(y * height), columns + round(x * width)) for y in SHIFTS for x in SHIFTS]


def _inside(indices: NDArray[np.intp], side: int) -> NDArray[np.intp]:
    """Positions of those of a view's row or column ``indices`` that lie inside an image with this ``side``."""
    return np.flatnonzero((indices >= 0) & (indices < side))
