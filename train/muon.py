"""Muon: momentum with orthogonalised steps, for the filters of convolutions.

Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024), in the form that cifar10-airbench uses:
every step has the same length relative to the weights, whose norm is held fixed (BatchNorm makes it irrelevant), so the
learning rate is an angle and weight decay would have no effect.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from train.precision import has_bfloat16

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, chosen by its author for a steep slope at zero."""
ITERATIONS = 3


def orthogonalize(matrix: Tensor) -> Tensor:
    """Roughly the (semi-)orthogonal matrix nearest to ``matrix`` (rows, columns): its singular values are near 1."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix.size(0) <= matrix.size(1)
    x: Tensor = (matrix if wide else matrix.T).to(torch.bfloat16 if has_bfloat16(matrix.device) else torch.float32)
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """``lr`` is the norm of a step relative to the norm of the weights."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nothing here re-evaluates the loss
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"]
                buffer.mul_(group["momentum"]).add_(weight.grad)
                nesterov = weight.grad.add(buffer, alpha=group["momentum"])
                step = orthogonalize(nesterov.reshape(len(weight), -1)).view(weight.shape)
                weight.mul_(len(weight) ** 0.5 / weight.norm())
                weight.add_(step, alpha=-group["lr"])
