"""CUDA graphs: all kernels of a network launched as one.

A GPU computes a network of this size faster than Python launches its kernels one by one. A graph is captured for a
fixed batch size: there is one for each power of two, and a batch uses the smallest that holds it, padded with leftovers
of earlier batches. See "Accelerating PyTorch with CUDA Graphs" (pytorch.org, 2021). Imported only where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.preprocess import Pixels

WARM_UPS = 3
"""Runs before capture, in which libraries choose their kernels and allocate their workspaces."""


class Graphs:
    """``function``, from (N, H, W, 3) uint8 images on ``device`` to (N, ...) outputs, for up to ``largest`` images.

    Created and called on one stream, by one thread at a time; not on the default stream, which cannot be captured.
    Raises ``RuntimeError`` for a function that cannot be either.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], shape: tuple[int, int, int], largest: int, device: torch.device
    ) -> None:
        # From pageable memory the driver would first copy to a pinned buffer of its own.
        self._pinned = torch.zeros((largest, *shape), dtype=torch.uint8, pin_memory=True)
        self._images = torch.zeros((largest, *shape), dtype=torch.uint8, device=device)
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode(), torch.cuda.device(device):
            for size in reversed(sizes(largest)):  # the largest first, so that the others reuse its memory
                self._recorded[size] = _record(function, self._images[:size], pool)

    def __call__(self, images: Pixels) -> Tensor:
        """Outputs for ``images`` on the CPU; raises ``KeyError`` for more than ``largest`` of them."""
        count = len(images)
        graph, outputs = self._recorded[ceiling(count)]
        with torch.inference_mode():
            self._pinned[:count].copy_(torch.from_numpy(images))
            self._images[:count].copy_(self._pinned[:count], non_blocking=True)
            graph.replay()
            return outputs[:count].cpu()  # waits for the copies and the graph


def _record(function: Callable[[Tensor], Tensor], images: Tensor, pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    for _ in range(WARM_UPS):
        function(images)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
        outputs = function(images)
    return graph, outputs


def sizes(largest: int) -> list[int]:
    """The powers of two up to ``largest``, which is one of them."""
    return [2**power for power in range(largest.bit_length())]


def ceiling(count: int) -> int:
    """The smallest power of two that is not below ``count``, which is at least 1."""
    return 1 << (count - 1).bit_length()
