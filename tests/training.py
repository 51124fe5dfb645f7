"""Small training runs: in this process, and through the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests import toy
from train import data
from train.fit import Fit
from train.options import build_config
from train.parallel import ALONE
from train.recipe import Recipe


def begin(source: data.Data, out: Path, **recipe: Any) -> Fit:
    """A run of a small network that has not trained yet."""
    chosen = Recipe(**{"batch_size": 32, "widths": "8,32", "depth": 2, **recipe})
    return Fit(build_config("toy", source, chosen), source, chosen, out, torch.device("cpu"), ALONE)


def train_on(source: Path, out: Path, *options: object, name: str = "toy", code: int = 0) -> str:
    """Run ``python -m train.fit`` with the recipe of ``toy_run``, unless ``options`` say otherwise."""
    return toy.run("train.fit", source, "--name", name, "--out", out, *toy.RECIPE, *options, code=code)
