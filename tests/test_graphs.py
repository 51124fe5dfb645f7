"""What of CUDA graphs needs no GPU; the rest is ``make check-gpu``."""

from __future__ import annotations

from model.graphs import ceiling, sizes
from model.runtimes import GRAPHED_IMAGES, graphed_images


def test_every_batch_has_the_next_larger_graph() -> None:
    recorded = sizes(GRAPHED_IMAGES)
    assert recorded == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    for count in range(1, GRAPHED_IMAGES + 1):
        assert ceiling(count) == min(size for size in recorded if size >= count)


def test_large_images_have_graphs_of_fewer() -> None:
    """Those of 256 images of 224x224 pixels would fill a small GPU."""
    assert [graphed_images((side, side)) for side in (32, 64, 96, 224, 4096)] == [256, 256, 64, 16, 1]
