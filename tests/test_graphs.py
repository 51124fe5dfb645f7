"""The parts of CUDA graphs that need no GPU; ``make check-gpu`` tests the rest."""

from __future__ import annotations

from model.graphs import ceiling, sizes
from model.runtimes import GRAPHED_IMAGES, graphed_images


def test_every_batch_uses_the_next_larger_graph() -> None:
    recorded = sizes(GRAPHED_IMAGES)
    assert recorded == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    for count in range(1, GRAPHED_IMAGES + 1):
        assert ceiling(count) == min(size for size in recorded if size >= count)


def test_graphs_of_large_images_hold_fewer_of_them() -> None:
    """Graphs for 256 images of 224x224 pixels would fill a small GPU."""
    assert [graphed_images((side, side)) for side in (32, 64, 96, 224, 4096)] == [256, 256, 64, 16, 1]
