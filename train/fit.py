"""Train the network on a source of labelled images.

    python -m train.fit SOURCE --name cifar10_cnn --out runs/cifar10_cnn [--resume]

Writes to ``--out``: ``config.json``, ``checkpoint.safetensors`` after every epoch (weights, momentum and position, no
pickle) and ``run.json`` (the command, data, figures of each epoch, wall time). Ctrl-C or a kill loses the unfinished
epoch at most: ``--resume`` goes on from the last finished one, and an epoch's random numbers depend on the seed and on
its index alone, so the resumed run is the same run.

The recipe is that of cifar10-airbench (Jordan, 2024, arXiv:2404.00498), stretched over more epochs: Muon for the
filters and SGD for the rest on one triangular schedule, label smoothing, alternating flip, translation and cutout.
Added are zoom, because users send objects of every size, and smaller images in the first epochs (progressive resizing,
as in fast.ai's DAWNBench entry of 2018), because two CPU cores then finish sooner.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from model.config import ModelConfig
from model.network import ConvNet
from train import command
from train.check import check, print_findings
from train.data import Data, DataError, Split, load
from train.muon import Muon

CONFIG, CHECKPOINT, RUN = "config.json", "checkpoint.safetensors", "run.json"
SMALLEST_MAP = 3
"""Stages halve the input until it is about this small."""
WHITENING_IMAGES = 5000


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters; each is a flag of the same name."""

    epochs: int = 25
    batch_size: int = 512
    lr: float = 0.25
    """Of BatchNorm and the head."""
    momentum: float = 0.9
    """Of BatchNorm and the head."""
    muon_lr: float = 0.1
    """Learning rate of the filters: the length of a step relative to the weights'."""
    muon_momentum: float = 0.6
    low_res: float = 0.6
    """Share of the epochs, the first ones, that see images of 3/4 of the size and cost little more than half."""
    weight_decay: float = 5e-4
    warmup: float = 0.08
    """Share of the steps in which the learning rate rises, before it falls to zero; both linearly."""
    label_smoothing: float = 0.1
    translate: float = 0.125
    """Largest shift, as a share of the image's side; the border is reflected."""
    cutout: float = 0.375
    """Side of the square that is blanked, as a share of the image's side."""
    zoom: float = 1.3
    """Every other image is scaled by up to this factor, up or down, and stretched by up to its square root."""
    widths: str = "96,256,384"
    """Channels of the stages; the last number holds for all further ones."""
    depth: int = 3
    seed: int = 0


def build_config(name: str, data: Data, recipe: Recipe) -> ModelConfig:
    """What follows from the data: classes, size and normalisation; and as many stages as the size allows."""
    mean, std = data.channel_statistics()
    stages, side = 0, min(data.input_size)
    while side // 2 >= SMALLEST_MAP:
        stages, side = stages + 1, side // 2
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", recipe.widths):
        raise DataError(f"--widths {recipe.widths!r}; expected numbers of channels such as 64,256")
    widths = [int(width) for width in recipe.widths.split(",")]
    return ModelConfig.model_validate(
        {
            "name": name,
            "classes": data.classes,
            "input_size": data.input_size,
            "mean": mean,
            "std": std,
            "widths": [*widths, *widths[-1:] * stages][:stages],
            "depth": recipe.depth,
        }
    )


class Augmented:
    """Shuffled, augmented batches of a training split, on a device.

    Flip and translation are one gather of row and column indexes, so that they cost no interpolation. The flip
    alternates: an image flipped in one epoch is not in the next (Jordan, 2024).
    """

    def __init__(self, split: Split, recipe: Recipe, device: torch.device) -> None:
        self.images = torch.from_numpy(split.images).to(device)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.recipe, self.device = recipe, device
        self.flip_parity = torch.randint(0, 2, (len(split),), generator=self._generator(-1))

    def __len__(self) -> int:
        return max(1, len(self.labels) // self.recipe.batch_size)

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch + 1)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images (B, H, W, 3) uint8 and labels (B,)."""
        generator = self._generator(epoch)
        for index in torch.randperm(len(self.labels), generator=generator).tensor_split(len(self)):
            flip = (self.flip_parity[index] + epoch) % 2 == 1
            images = self._shift(index.to(self.device), flip, generator)
            if self.recipe.zoom > 1:
                images[::2] = self._zoom(images[::2], generator)
            images = self._cutout(images, generator)
            if epoch < int(self.recipe.low_res * self.recipe.epochs):
                images = self._shrink(images)
            yield images, self.labels[index.to(self.device)]

    def _shift(self, index: Tensor, flip: Tensor, generator: torch.Generator) -> Tensor:
        height, width = self.images.shape[1:3]
        rows = self._shifted(len(index), height, generator)
        columns = self._shifted(len(index), width, generator)
        columns = torch.where(flip[:, None], width - 1 - columns, columns)
        rows, columns = rows.to(self.device), columns.to(self.device)
        return self.images[index[:, None, None], rows[:, :, None], columns[:, None, :]]

    def _shifted(self, count: int, side: int, generator: torch.Generator) -> Tensor:
        reach = int(self.recipe.translate * side)
        shift = torch.randint(-reach, reach + 1, (count, 1), generator=generator)
        index = (torch.arange(side) + shift).abs()
        return torch.where(index >= side, 2 * (side - 1) - index, index)

    def _zoom(self, images: Tensor, generator: torch.Generator) -> Tensor:
        reach = math.log(self.recipe.zoom)
        scale, stretch = (torch.rand((2, len(images)), generator=generator) * 2 - 1) * reach
        theta = torch.zeros(len(images), 2, 3)
        theta[:, 0, 0] = torch.exp(scale + stretch / 4)
        theta[:, 1, 1] = torch.exp(scale - stretch / 4)
        pixels = images.permute(0, 3, 1, 2).float()
        grid = F.affine_grid(theta.to(self.device), list(pixels.shape), align_corners=False)
        zoomed = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
        return zoomed.round().to(torch.uint8).permute(0, 2, 3, 1)

    def _shrink(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).float()
        shrunk = F.interpolate(pixels, scale_factor=0.75, mode="bilinear", antialias=True)
        return shrunk.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def _cutout(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count, height, width = images.shape[:3]

        def band(side: int) -> Tensor:
            size = int(self.recipe.cutout * side)
            start = torch.randint(-size // 2, side - size // 2 + 1, (count, 1), generator=generator)
            position = torch.arange(side) - start
            return ((position >= 0) & (position < size)).to(self.device)

        hole = band(height)[:, :, None] & band(width)[:, None, :]
        mean = images.float().mean(dim=(1, 2), keepdim=True).to(torch.uint8)
        return torch.where(hole[..., None], mean, images)


@torch.no_grad()
def accuracy(network: ConvNet, split: Split, device: torch.device, batch_size: int = 500) -> float:
    """Share of ``split`` that ``network`` gets right, evaluated as it was trained (mixed precision)."""
    network.eval()
    hits = 0
    for start in range(0, len(split), batch_size):
        images = torch.from_numpy(split.images[start : start + batch_size]).to(device)
        labels = torch.from_numpy(split.labels[start : start + batch_size]).to(device)
        with autocast(device):
            hits += int((network(images).argmax(1) == labels).sum())
    network.train()
    return hits / len(split)


def autocast(device: torch.device) -> torch.autocast:
    """FP16 on CUDA, bfloat16 elsewhere."""
    return torch.autocast(device.type, torch.float16 if device.type == "cuda" else torch.bfloat16)


class Fit:
    """One training run: a network, its optimiser, and where in the schedule it stands."""

    def __init__(self, config: ModelConfig, data: Data, recipe: Recipe, out: Path, device: torch.device) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.data, self.out, self.device = recipe, data, out, device
        self.network = ConvNet(config).to(device)
        self.network.init_whitening(
            torch.from_numpy(data.train.images[:: max(1, len(data.train) // WHITENING_IMAGES)]).to(device)
        )
        self.batches = Augmented(data.train, recipe, device)
        trained = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        filters = [p for p in trained.values() if p.ndim == 4]
        rest = [p for p in trained.values() if p.ndim == 1]
        groups: list[dict[str, Any]] = [
            {"params": [self.network.head.weight], "weight_decay": recipe.weight_decay},
            {"params": rest},
        ]
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (Muon(filters, recipe.muon_lr, recipe.muon_momentum), recipe.muon_lr),
            (torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=True), recipe.lr),
        ]
        self.states: dict[str, dict[str, Any]] = {
            name: self.optimizers[0 if p.ndim == 4 else 1][0].state[p] for name, p in trained.items()
        }
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
        self.data_sha256 = data.sha256()
        self.epochs_done = 0
        self.history: list[dict[str, float]] = []

    def _pace(self, step: int) -> float:
        """What the learning rates are multiplied with: up in a straight line to 1, then down to 0."""
        total = self.recipe.epochs * len(self.batches)
        rise = max(1, int(self.recipe.warmup * total))
        return min((step + 1) / rise, (total - step) / (total - rise + 1))

    def run(self, progress: tqdm[Any]) -> None:
        """Train to the last epoch, a checkpoint after each."""
        while self.epochs_done < self.recipe.epochs:
            started = time.perf_counter()
            loss, hits = self._epoch(progress)
            seconds = time.perf_counter() - started
            self.epochs_done += 1
            self.history.append(
                {
                    "epoch": self.epochs_done,
                    "loss": round(loss, 4),
                    "train_accuracy": round(hits, 4),
                    "val_accuracy": round(accuracy(self.network, self.data.val, self.device), 4),
                    "images_per_s": round(len(self.data.train) / seconds, 1),
                    "seconds": round(seconds, 1),
                }
            )
            self.save()
            progress.write("  ".join(f"{key} {value:g}" for key, value in self.history[-1].items()))

    def _epoch(self, progress: tqdm[Any]) -> tuple[float, float]:
        self.network.train()
        losses, hits = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        done = 0
        first_step = self.epochs_done * len(self.batches)
        for step, (images, labels) in enumerate(self.batches.epoch(self.epochs_done), first_step):
            for optimizer, rate in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * self._pace(step)
                optimizer.zero_grad(set_to_none=True)
            with autocast(self.device):
                logits = self.network(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            for optimizer, _ in self.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
            losses += loss.detach() * len(labels)
            hits += (logits.detach().argmax(1) == labels).sum()
            done += len(labels)
            progress.update(len(labels))
            progress.set_postfix(
                epoch=self.epochs_done + 1, loss=f"{losses / done:.3f}", acc=f"{hits / done:.3f}", refresh=False
            )
        return float(losses / done), float(hits / done)

    def save(self) -> None:
        """Write the checkpoint; a kill in mid-write leaves the previous checkpoint whole."""
        tensors = {f"network.{n}": t.contiguous() for n, t in self.network.state_dict().items()}
        for name, state in self.states.items():
            if "momentum_buffer" in state:
                tensors[f"momentum.{name}"] = state["momentum_buffer"].contiguous()
        position = {
            "recipe": asdict(self.recipe),
            "epochs_done": self.epochs_done,
            "data_sha256": self.data_sha256,
            "scaler": self.scaler.state_dict(),
            "history": self.history,
        }
        partial = self.out / (CHECKPOINT + ".partial")
        save_file(tensors, partial, metadata={"position": json.dumps(position)})
        partial.replace(self.out / CHECKPOINT)

    def take_weights(self, path: Path) -> None:
        """Begin with the weights of another run's checkpoint instead of random ones."""
        try:
            self.network.load_state_dict(read_weights(path))
        except RuntimeError as error:
            raise DataError(f"{path}: not the weights of this network: {error}") from error

    def resume(self) -> None:
        """Take up the checkpoint in ``out``; raises ``DataError`` when its recipe is another."""
        if not (self.out / CHECKPOINT).exists():
            raise DataError(f"{self.out}: has no {CHECKPOINT} to resume from")
        with safe_open(self.out / CHECKPOINT, "pt", device=str(self.device)) as checkpoint:
            position = json.loads(checkpoint.metadata()["position"])
            if position["recipe"] != asdict(self.recipe):
                raise DataError(
                    f"{self.out / CHECKPOINT}: its recipe is {position['recipe']}; expected {asdict(self.recipe)}"
                )
            if position["data_sha256"] != self.data_sha256:
                raise DataError(f"{self.out / CHECKPOINT}: was trained on other data than {self.data.source}")
            held = set(checkpoint.keys())
            for name, state in self.states.items():
                if f"momentum.{name}" in held:
                    state["momentum_buffer"] = checkpoint.get_tensor(f"momentum.{name}")
        self.network.load_state_dict(read_weights(self.out / CHECKPOINT))
        self.epochs_done, self.history = position["epochs_done"], position["history"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(position["scaler"])


def read_weights(path: Path) -> dict[str, Tensor]:
    """The network's state in a checkpoint, on the CPU."""
    with safe_open(path, "pt") as checkpoint:
        names = [name for name in checkpoint.keys() if name.startswith("network.")]  # noqa: SIM118 (not a dict)
        return {name.removeprefix("network."): checkpoint.get_tensor(name) for name in names}


def describe_run(fit: Fit, command: str, started: float) -> dict[str, object]:
    """What ``run.json`` and later the card tell of a run; a resumed part counts in ``training_seconds`` alone."""
    return {
        "command": command,
        "source": Path(fit.data.source).name,
        "data_sha256": fit.data_sha256,
        "images": {name: len(getattr(fit.data, name)) for name in ("train", "val", "test")},
        "recipe": asdict(fit.recipe),
        "parameters": sum(p.numel() for p in fit.network.parameters()),
        "device": torch.cuda.get_device_name()
        if fit.device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "wall_seconds": round(time.time() - started, 1),
        "training_seconds": round(sum(epoch["seconds"] for epoch in fit.history), 1),
        "history": fit.history,
    }


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Recipe]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--name", required=True, help="name of the model in the store")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--start", type=Path, metavar="RUN", help="start from the weights of a finished run")
    parser.add_argument("--size", type=int, help="side of the network's input in pixels (default: from the data)")
    for name, default in asdict(Recipe()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    options = parser.parse_args(arguments)
    return options, Recipe(**{name: getattr(options, name) for name in asdict(Recipe())})


def main() -> None:
    options, recipe = parse_arguments()
    started = time.time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    data = load(options.source, (options.size,) * 2 if options.size else None)
    findings = check(data)
    print_findings(findings)
    config = build_config(options.name, data, recipe)
    fit = Fit(config, data, recipe, options.out, device)
    if options.resume:
        fit.resume()
    elif (options.out / CHECKPOINT).exists():
        raise DataError(f"{options.out}: holds a run already; --resume it, or choose another --out")
    else:
        if options.start:
            fit.take_weights(options.start / CHECKPOINT)
        fit.save()
    config.save(options.out / CONFIG)
    total, done = (epochs * len(data.train) for epochs in (recipe.epochs, fit.epochs_done))
    print(
        f"{config.name}: {len(data.train)} images of {len(config.classes)} classes at {config.input_size}, on {device}"
    )
    try:
        # Without a terminal (a log file) a bar once a minute is plenty.
        interval = 0.5 if sys.stderr.isatty() else 60
        with tqdm(total=total, initial=done, unit="img", mininterval=interval, maxinterval=interval) as progress:
            fit.run(progress)
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; {options.out / CHECKPOINT} holds {fit.epochs_done} finished epochs: go on with --resume")
    # The card is public: what it tells of paths is their last part.
    typed = shlex.join(
        ["python", "-m", "train.fit", *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:])]
    )
    about = {**describe_run(fit, typed, started), "check": findings}
    if options.start:
        about["start"] = json.loads((options.start / RUN).read_text())
    (options.out / RUN).write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    command.run(main)
