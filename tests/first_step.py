"""Started by test_parallel.py in several processes: the first batch's gradients, an overflowing step, an epoch.

Each process writes OUT/<rank>.safetensors; torchrun --nproc-per-node=2 -m tests.first_step SOURCE OUT does the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from train import data
from train.fit import Fit
from train.options import build_config
from train.parallel import Group, join
from train.recipe import Recipe

RECIPE = Recipe(batch_size=34, widths="8,32", depth=2)


def build(source: str, group: Group) -> Fit:
    loaded = data.load(source)
    return Fit(build_config("toy", loaded, RECIPE), loaded, RECIPE, Path(), torch.device("cpu"), group)


def gradients(fit: Fit) -> dict[str, Tensor]:
    """Gradients of the first batch, with BatchNorm's running statistics, so that dividing the batch changes nothing."""
    fit.network.eval()
    fit.backward(next(fit.batches.epoch(0)))
    return {name: p.grad.clone().contiguous() for name, p in fit.trained.items() if p.grad is not None}


def scale_after_overflow(fit: Fit, overflows: bool) -> Tensor:
    """The loss scale after a batch whose gradients overflow in this process or in another one."""
    fit.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fit.network.zero_grad()
    batch = next(fit.batches.epoch(0))
    fit.backward(batch._replace(views=batch.views * torch.inf) if overflows else batch)
    for optimizer in fit.optimizers:
        fit.scaler.step(optimizer)
    fit.scaler.update()
    return torch.tensor(fit.scaler.get_scale())


def running_statistics(fit: Fit) -> dict[str, Tensor]:
    """BatchNorm's running statistics after an epoch: ``alone.<name>`` in this process, ``averaged.<name>`` over all."""

    def copies(prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}.{n}": b.clone() for n, b in fit.network.named_buffers() if "running_" in n}

    def average() -> None:
        found.update(copies("alone"))
        Fit._average_statistics(fit)

    found: dict[str, Tensor] = {}
    fit._average_statistics = average
    fit._epoch(tqdm(disable=True))
    return found | copies("averaged")


def main() -> None:
    source, out = sys.argv[1:]
    with join() as (group, _):
        fit = build(source, group)
        tensors = gradients(fit)
        before = fit.network.head.weight.detach().clone()
        tensors["scale"] = scale_after_overflow(fit, group.rank == 1)
        tensors["moved"] = (fit.network.head.weight.detach() - before).abs().sum()
        tensors |= running_statistics(build(source, group))
        save_file(tensors, Path(out) / f"{group.rank}.safetensors")


if __name__ == "__main__":
    main()
