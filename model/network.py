"""The convolutional network. Imported only where torch is used: training, export and the ``torch`` runtime.

A whitening stem, then stages of 3x3 convolutions with BatchNorm, ReLU and one residual connection each, global max
pooling and a linear layer: the architecture of cifar10-airbench (Jordan, 2024, arXiv:2404.00498), with ReLU instead of
GELU because integer kernels fuse it, and with as many stages as the input size allows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import CHANNELS, ModelConfig

WHITENING_KERNEL = 2
NEIGHBOURS = 5
BANK_BATCH = 128
LOGIT_SCALE = 1 / 9
"""Keeps the first logits small: the global maximum over many channels is large at initialisation."""


class Normalize(nn.Module):
    """Raw pixels (N, H, W, 3), uint8 or float in 0..255, to standardised floats (N, 3, H, W).

    The permutation is a view, and leaves the tensor in channels_last, the fastest layout for convolutions.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, CHANNELS, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, CHANNELS, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std


class ConvNorm(nn.Sequential):
    """3x3 convolution, optional 2x2 max pooling, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, pool: bool = False) -> None:
        layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
        if pool:
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Stage(nn.Module):
    """Halves the resolution: a pooled convolution, then ``depth - 1`` more with a residual connection."""

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        self.reduce = ConvNorm(inputs, outputs, pool=True)
        self.refine = nn.Sequential(*(ConvNorm(outputs, outputs) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        refined: Tensor = self.refine(x)
        return x + refined


class ConvNet(nn.Module):
    """(N, H, W, 3) raw pixels to (N, len(classes)) uncalibrated logits, float32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Every filter and its negative, so that ReLU discards no information.
        whitened = 2 * CHANNELS * WHITENING_KERNEL**2
        self.normalize = Normalize(config.mean, config.std)
        self.whiten = nn.Conv2d(CHANNELS, whitened, WHITENING_KERNEL)
        channels = (whitened, *config.widths)
        self.stages = nn.Sequential(*(Stage(i, o, config.depth) for i, o in zip(channels, config.widths, strict=False)))
        self.head = nn.Linear(config.widths[-1], len(config.classes), bias=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.feature_maps(self.stem(images)).amax(dim=(2, 3)))

    def stem(self, images: Tensor) -> Tensor:
        whitened: Tensor = self.whiten(self.normalize(images).to(self.whiten.weight.dtype))
        return whitened

    def feature_maps(self, whitened: Tensor) -> Tensor:
        """The stem's output to (N, D, h, w); the head sees the maximum of each map."""
        maps: Tensor = self.stages(F.relu(whitened))
        return maps

    def logits(self, features: Tensor) -> Tensor:
        """(..., D) features to (..., K) float32."""
        logits: Tensor = self.head(features)
        return logits.float() * LOGIT_SCALE

    @torch.no_grad()
    def init_whitening(self, images: Tensor, batch: int, eps: float = 5e-4) -> None:
        """Set the stem to the whitening transform of 2x2 patches of ``images`` (N, H, W, 3) and freeze its weight.

        ``batch`` images at a time, because the patches take sixteen times their bytes.
        """
        k = WHITENING_KERNEL
        covariance = torch.zeros((CHANNELS * k * k,) * 2, device=images.device)
        count = 0
        for part in torch.split(images, batch):
            patches = F.unfold(self.normalize(part), k).transpose(1, 2).reshape(-1, CHANNELS * k * k)
            covariance += patches.T @ patches
            count += len(patches)
        values, vectors = torch.linalg.eigh(covariance / count)
        filters = (vectors / (values + eps).sqrt()).T.reshape(-1, CHANNELS, k, k)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))
        assert self.whiten.bias is not None
        self.whiten.bias.zero_()
        self.whiten.weight.requires_grad_(False)


class ServedNet(nn.Module):
    """The trained network with a bank of training features for detecting foreign images, as an artifact holds it.

    Familiarity is the cosine similarity of an image's features to the ``NEIGHBOURS``-th nearest in the bank, or to the
    farthest if it holds fewer (Sun et al., 2022, arXiv:2204.06507).
    """

    bank: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.network = ConvNet(config)
        self.register_buffer("bank", torch.zeros(config.widths[-1], config.bank))

    def forward(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) raw pixels to (N, K + 1) float32: logits, then familiarity."""
        return self.outputs(self.network.feature_maps(self.network.stem(images)))

    def explain(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) raw pixels to the ``evidence`` (N, h, w, K) for each class."""
        return self.evidence(self.network.feature_maps(self.network.stem(images)))

    def outputs(self, maps: Tensor) -> Tensor:
        features = maps.amax(dim=(2, 3))
        similarity = F.normalize(features.float(), dim=1) @ self.bank.float()
        familiarity = similarity.topk(min(NEIGHBOURS, len(self.bank.T)), dim=1).values[:, -1:]
        return torch.cat([self.network.logits(features), familiarity], dim=1)

    def evidence(self, maps: Tensor) -> Tensor:
        """(N, h, w, K) float32: what each place adds to each logit; summed over all places, the logits.

        A class activation map (Zhou et al., 2016, arXiv:1512.04150) for global max pooling: in each feature map only
        the place of the maximum counts.
        """
        winners = (maps == maps.amax(dim=(2, 3), keepdim=True)).to(maps.dtype)
        shares = maps * winners / winners.sum(dim=(2, 3), keepdim=True)
        return self.network.logits(shares.permute(0, 2, 3, 1))

    @torch.no_grad()
    def init_bank(self, images: Tensor, batch: int = BANK_BATCH) -> None:
        """Fill the bank with the unit-length features of ``images`` (config.bank, H, W, 3), ``batch`` at a time."""
        for slots, part in zip(torch.split(self.bank.T, batch), torch.split(images, batch), strict=True):
            maps = self.network.feature_maps(self.network.stem(part))
            slots.copy_(F.normalize(maps.amax(dim=(2, 3)), dim=1))


def halve(network: ServedNet) -> ServedNet:
    """Convert the convolutions, head and bank of ``network`` to FP16, in place; the rest stays FP32, for precision."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.half()
    network.bank = network.bank.half()
    return network
