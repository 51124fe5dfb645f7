"""Faster convolutions of small maps on a CPU with AMX.

oneDNN works along the rows of a map, and rows of 2 to 8 places leave most of AMX's tiles empty, above all for the
gradient of the weights. So the maps of a batch are laid side by side in one long strip, separated by a column of zeros,
which is how a 3x3 convolution pads borders: the sums are the same, and an epoch takes half to two thirds of the time.
Processors without AMX gain where a map is 2 places wide, and lose where it is 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

WIDEST_MAP = 8
"""Wider maps are faster as they are."""


def strips_are_faster(device: torch.device) -> bool:
    """Whether small maps are faster in strips on ``device``."""
    return device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False)


def use_strips(network: nn.Module) -> None:
    """Make the 3x3 convolutions of ``network`` compute small maps in strips; they keep their weights."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d) and (module.kernel_size, module.padding) == ((3, 3), (1, 1)):
            network.set_submodule(name, StripConv2d(module))


class StripConv2d(nn.Module):
    """A 3x3 convolution with zero padding and no bias that shares the weights of ``convolution``."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight = convolution.weight

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, h, w) to (N, D, h, w)."""
        if maps.shape[3] > WIDEST_MAP:
            return nn.functional.conv2d(maps, self.weight, padding=1)
        result: Tensor = _Convolve.apply(maps, self.weight)
        return result


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor) -> Tensor:
        if torch.is_autocast_enabled(maps.device.type):
            dtype = torch.get_autocast_dtype(maps.device.type)
            maps, weight = maps.to(dtype), weight.to(dtype)
        strip = _strip(maps)
        ctx.save_for_backward(strip, weight)
        return _cut(nn.functional.conv2d(strip, weight, padding=1), maps.shape[3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        strip, weight = ctx.saved_tensors
        by_strip, by_weight, _ = torch.ops.aten.convolution_backward(
            _strip(gradient), strip, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
        )
        return _cut(by_strip, gradient.shape[3]), by_weight


def _strip(maps: Tensor) -> Tensor:
    """(N, C, h, w) to (1, C, h, N * (w + 1)), both channels_last."""
    count, channels, height, width = maps.shape
    strip = maps.new_zeros(height, count, width + 1, channels)
    strip[:, :, :width] = maps.permute(2, 0, 3, 1)
    return strip.view(1, height, -1, channels).permute(0, 3, 1, 2)


def _cut(strip: Tensor, width: int) -> Tensor:
    """Undo ``_strip`` for maps of this ``width``."""
    _, channels, height, _ = strip.shape
    maps = strip.permute(2, 0, 3, 1).view(height, -1, width + 1, channels)[:, :, :width]
    return maps.permute(1, 3, 0, 2).contiguous(memory_format=torch.channels_last)
