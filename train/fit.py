"""Train the network on a source of labelled images.

    python -m train.fit SOURCE --name flowers --out runs/flowers [--resume]
    torchrun --nproc-per-node=4 -m train.fit …      # on four GPUs; train/parallel.py explains what differs

Writes to ``--out``: ``config.json``; after every epoch ``checkpoint.safetensors`` (weights, momentum and position, no
pickle); at the end ``run.json`` (the command, data, figures of each epoch, wall time). Ctrl-C or a kill loses at most
the unfinished epoch: ``--resume`` continues from the last finished one, and an epoch's random numbers depend only on
the seed and its index, so the resumed run is the same run.

The recipe is that of cifar10-airbench (Jordan, 2024, arXiv:2404.00498), stretched over more epochs: Muon for the
filters and SGD for the rest on one triangular schedule, label smoothing, alternating flip, translation and cutout. It
adds zoom, because users send objects of every size, and a lower resolution in the first epochs (progressive resizing,
as in fast.ai's DAWNBench entry of 2018), because two CPU cores then finish sooner.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from model.artifact import CONFIG
from model.config import ModelConfig
from model.network import ConvNet
from train import command
from train.augment import Augmented, Batch
from train.check import check, print_findings
from train.command import CommandError
from train.data import Data, Split, batch_of, in_batches, load
from train.muon import Muon
from train.options import Options, build_config, parse
from train.parallel import Group, join
from train.precision import autocast, compute_dtype
from train.recipe import DEFAULTS, Recipe
from train.runs import CHECKPOINT, DIGESTS, NETWORK, RUN, Trained, read_checkpoint, write_checkpoint
from train.strips import strips_are_faster, use_strips

WHITENING_IMAGES = 5000
VALIDATION_BATCH = 500


@torch.no_grad()
def count_hits(network: ConvNet, split: Split, device: torch.device) -> Tensor:
    """How many images of ``split`` the ``network`` gets right (scalar), in mixed precision as in training."""
    network.eval()
    hits = torch.zeros((), device=device)
    for batch in in_batches(split.images, VALIDATION_BATCH):
        images, labels = (torch.from_numpy(array[batch]).to(device) for array in (split.images, split.labels))
        with autocast(device):
            hits += (network(images).argmax(1) == labels).sum()
    return hits


class Fit:
    """One training run: a network, its optimisers, and its position in the schedule."""

    def __init__(
        self, config: ModelConfig, data: Data, recipe: Recipe, out: Path, device: torch.device, group: Group
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.config, self.recipe, self.data = config, recipe, data
        self.out, self.device, self.group = out, device, group
        self.network = self._network(config)
        self.network.init_whitening(
            torch.from_numpy(data.train.images[:: math.ceil(len(data.train) / WHITENING_IMAGES)]).to(device),
            batch_of(data.input_size, VALIDATION_BATCH),
        )
        self.teachers: list[ConvNet] = []
        self.learned_from: dict[str, list[str]] = {"start": [], "teacher": []}
        self.batches = Augmented(data.train, recipe, device, group)
        self.trained = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        filters = [p for p in self.trained.values() if p.ndim == 4]
        rest = [p for p in self.trained.values() if p.ndim == 1]
        groups: list[dict[str, Any]] = [
            {"params": [self.network.head.weight], "weight_decay": recipe.weight_decay},
            {"params": rest},
        ]
        muon = Muon(filters, recipe.muon_lr, recipe.muon_momentum)
        sgd = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=True)
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (muon, sgd)
        self.states: dict[str, dict[str, Any]] = {
            name: (muon if p.ndim == 4 else sgd).state[p] for name, p in self.trained.items()
        }
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
        self.data_sha256 = data.sha256()
        self.digests: set[int] | None = set(data.train.digests)
        """Digests of the files that the network has been trained on; None if ``--start`` does not record its own."""
        self.epochs_done = 0
        self.history: list[dict[str, float]] = []

    def _network(self, config: ModelConfig) -> ConvNet:
        """A network with random weights, in the form that is fastest on the device."""
        network = ConvNet(config).to(self.device)
        if strips_are_faster(self.device):
            use_strips(network)
        return network

    def _lr_factor(self, step: int) -> float:
        """Factor of the learning rates: rises linearly to 1, then falls linearly to 0."""
        total = self.recipe.epochs * len(self.batches)
        rise = max(1, int(self.recipe.warmup * total))
        return min((step + 1) / rise, (total - step) / (total - rise + 1))

    def run(self, progress: tqdm[Any]) -> None:
        """Train to the last epoch, writing a checkpoint after each."""
        self.validate()  # the last epoch, if a kill prevented it
        while self.epochs_done < self.recipe.epochs:
            started = time.perf_counter()
            loss, accuracy = self._epoch(progress)
            seconds = time.perf_counter() - started
            self.epochs_done += 1
            self.history.append(
                {
                    "epoch": self.epochs_done,
                    "loss": round(loss, 4),
                    "train_accuracy": round(accuracy, 4),
                    "images_per_s": round(len(self.data.train) / seconds, 1),
                    "seconds": round(seconds, 1),
                }
            )
            # Before validation, so that a kill during it (out of memory) costs no epoch.
            self.save()
            self.validate()
            progress.write("  ".join(f"{key} {value:g}" for key, value in self.history[-1].items()))

    def _epoch(self, progress: tqdm[Any]) -> tuple[float, float]:
        """Train for one epoch; returns its mean loss and its accuracy."""
        self.network.train()
        sums = torch.zeros(3, device=self.device)
        first_step = self.epochs_done * len(self.batches)
        for step, batch in enumerate(self.batches.epoch(self.epochs_done), first_step):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = optimizer.defaults["lr"] * self._lr_factor(step)
                optimizer.zero_grad(set_to_none=True)
            sums += self.backward(batch)
            # The gradients are the same in every process, and so is the step, or the scaler's decision to skip it.
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
            progress.update(batch.size)
            loss, hits, done = sums.tolist()
            progress.set_postfix(
                epoch=self.epochs_done + 1, loss=f"{loss / done:.3f}", acc=f"{hits / done:.3f}", refresh=False
            )
        self.group.all_reduce_sum([sums])
        self._average_statistics()
        loss, hits, done = sums.tolist()
        return loss / done, hits / done

    def backward(self, batch: Batch) -> Tensor:
        """Set the gradients of the mean loss over a batch.

        Returns (3,): the sum of losses, the number of hits and the number of images of the share.
        """
        with autocast(self.device):
            logits = self.network(batch.views)
        loss = self._loss(logits, batch)
        self.scaler.scale(loss / batch.size).backward()  # type: ignore[no-untyped-call]
        self.group.all_reduce_sum(p.grad for p in self.trained.values() if p.grad is not None)
        hits = (logits.detach().argmax(1) == batch.labels).sum()
        return torch.stack([loss.detach(), hits, torch.full_like(hits, len(batch.labels))])

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Loss by the labels and a teacher that sees the images uncorrupted (Beyer et al., 2022, arXiv:2106.05237).

        The teachers take turns, one per batch, and see it mirrored every other time. The gradient is linear in the
        teacher's probabilities: on average the student learns from the mean of all teachers, at the cost of one.
        """
        recipe = self.recipe
        by_label = F.cross_entropy(logits, batch.labels, label_smoothing=recipe.label_smoothing, reduction="sum")
        if not self.teachers:
            return by_label
        t = recipe.distill_temperature
        mirrored, turn = divmod(batch.number, len(self.teachers))
        with torch.no_grad(), autocast(self.device):
            images = batch.images.flip(2) if mirrored % 2 * recipe.flip else batch.images
            taught = F.softmax(self.teachers[turn](images) / t, dim=1)
        by_teachers = F.kl_div(F.log_softmax(logits / t, dim=1), taught, reduction="sum") * t**2
        return torch.lerp(by_label, by_teachers, recipe.distill)

    def _average_statistics(self) -> None:
        statistics = [buffer for name, buffer in self.network.named_buffers() if "running_" in name]
        self.group.all_reduce_sum(statistics)
        for buffer in statistics:
            buffer /= self.group.size

    def validate(self) -> None:
        """Add the validation accuracy of the last epoch to the history, if missing, and write the checkpoint."""
        if not self.history or "val_accuracy" in self.history[-1]:
            return
        split = self.data.val
        share = self.group.share(len(split))
        hits = count_hits(self.network, Split(split.images[share], split.labels[share]), self.device)
        self.group.all_reduce_sum([hits])
        self.history[-1]["val_accuracy"] = round(float(hits) / len(split), 4)
        self.save()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The content of a checkpoint: tensors, and the position in the schedule."""
        tensors = {NETWORK + n: t for n, t in self.network.state_dict().items()}
        for name, state in self.states.items():
            if "momentum_buffer" in state:
                tensors[f"momentum.{name}"] = state["momentum_buffer"]
        if self.digests is not None:
            tensors[DIGESTS] = torch.tensor(sorted(self.digests))
        position = {
            "recipe": self.recipe.model_dump(),
            "epochs_done": self.epochs_done,
            "data_sha256": self.data_sha256,
            "learned_from": self.learned_from,
            "scaler": self.scaler.state_dict(),
            "history": self.history,
        }
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, position

    def restore(self, tensors: dict[str, Tensor], position: dict[str, Any]) -> None:
        """Restore what ``state`` returned."""
        self.network.load_state_dict({n.removeprefix(NETWORK): t for n, t in tensors.items() if n.startswith(NETWORK)})
        for name, state in self.states.items():
            if f"momentum.{name}" in tensors:
                state["momentum_buffer"] = tensors[f"momentum.{name}"].to(self.device)
        self.epochs_done, self.history = position["epochs_done"], position["history"]
        if self.scaler.is_enabled() and position["scaler"]:  # a run that began without a GPU has none
            self.scaler.load_state_dict(position["scaler"])

    def save(self) -> None:
        """Write the checkpoint, in the first process only."""
        if self.group.rank == 0:
            write_checkpoint(self.out, *self.state())

    def synchronize(self) -> None:
        """Give every process the state of the first: its weights, and where it resumes."""
        tensors, position = self.group.broadcast(self.state())
        if position["data_sha256"] != self.data_sha256:
            raise CommandError(
                f"{self.data.source}: process {self.group.rank} found other data there than the first one"
            )
        self.restore(tensors, position)

    def take_start(self, start: Trained) -> None:
        """Begin with the weights of ``start`` where this network has the same layers, and random ones elsewhere.

        The head is random for other classes, and so are stages that ``start`` lacks because its images are smaller.
        Raises ``CommandError`` for stages of another shape, and when ``start`` has learned from images held out here:
        every figure of them would be too good.
        """
        theirs, ours = start.config, self.config
        shared = min(len(theirs.widths), len(ours.widths))
        if (theirs.widths[:shared], theirs.depth) != (ours.widths[:shared], ours.depth):
            raise CommandError(
                f"{start.path}: a network of widths {list(theirs.widths)} and depth {theirs.depth}; expected "
                f"{list(ours.widths)} and {ours.depth} (--like takes its recipe)"
            )
        fresh = [f"stages.{stage}" for stage in range(shared, len(ours.widths))]
        if (theirs.classes, theirs.widths) != (ours.classes, ours.widths):
            fresh.append("head")
        weights, skipped = self.network.state_dict(), tuple(f"{layer}." for layer in fresh)
        weights |= {n: t for n, t in start.weights.items() if n in weights and not n.startswith(skipped)}
        self.network.load_state_dict(weights)
        if fresh:
            print(f"--start {start.path}: has no weights for {' and '.join(fresh)} of this network: they are random")
        self.learned_from["start"].append(start.sha256())
        if start.record["data_sha256"] != self.data_sha256:
            start.require_unseen(self.data)
        self.digests = None if start.digests is None else start.digests.union(self.data.train.digests)

    def take_teacher(self, trained: Trained) -> None:
        """Learn from the network of ``trained`` too; raises ``CommandError`` if its classes or input size differ."""
        classes = trained.config.classes
        if classes != self.data.classes:
            raise CommandError(f"{trained.path}: a teacher of {list(classes)}; expected {list(self.data.classes)}")
        if (size := trained.config.input_size) != self.data.input_size:
            raise CommandError(f"{trained.path}: a teacher of {size} pixels; expected {self.data.input_size}")
        teacher = self._network(trained.config)
        teacher.load_state_dict(trained.weights)
        self.teachers.append(teacher.eval().requires_grad_(False))
        self.learned_from["teacher"].append(trained.sha256())
        if trained.record["data_sha256"] != self.data_sha256:
            print(f"--teacher {trained.path}: was trained on other data, {trained.record['source']}")

    def resume(self) -> None:
        """Restore the run in ``out``; raises ``CommandError`` if its recipe, data, start, teachers or name differ."""
        path, config_path = self.out / CHECKPOINT, self.out / CONFIG
        tensors, position = read_checkpoint(self.out)
        wanted = self.recipe.model_dump()
        begun = {**DEFAULTS.model_dump(), **position["recipe"]}  # older runs lack newer hyperparameters
        if differing := [name for name in wanted if begun[name] != wanted[name]]:
            theirs, ours = ({name: recipe[name] for name in differing} for recipe in (begun, wanted))
            raise CommandError(f"{path}: its recipe has {theirs}; expected {ours}")
        if position["data_sha256"] != self.data_sha256:
            raise CommandError(f"{path}: was trained on other data than {self.data.source}")
        for option, given in self.learned_from.items():
            recorded = position.get("learned_from", {}).get(option, [])  # older checkpoints have none on record
            if recorded != given:
                raise CommandError(
                    f"{path}: on record for --{option} are weights {_short(recorded)}; expected {_short(given)}"
                )
        # After a kill before the first epoch there may be none.
        if config_path.exists() and (name := ModelConfig.load(config_path).name) != self.config.name:
            raise CommandError(f"{config_path}: its --name is {name!r}; expected {self.config.name!r}")
        self.restore(tensors, position)


def _short(digests: list[str]) -> str:
    return ", ".join(digest[:12] for digest in digests) or "none"


def prepare(
    options: Options,
    data: Data,
    start: Trained | None,
    teachers: list[Trained],
    device: torch.device,
    group: Group,
) -> Fit:
    """The run, at the position where it begins or resumes, in the same state in every process."""
    recipe = options.recipe_for(data)
    config = build_config(options.name, data, recipe)
    if start:
        # Its filters were trained on images with this normalisation.
        config = config.model_copy(update={"mean": start.config.mean, "std": start.config.std})
    fit = Fit(config, data, recipe, options.out, device, group)
    if start:
        fit.take_start(start)
    for teacher in teachers:
        fit.take_teacher(teacher)
    if group.rank == 0:
        if options.resume:
            fit.resume()
        fit.save()
        fit.config.save(fit.out / CONFIG)
    fit.synchronize()
    return fit


def run_to_the_end(fit: Fit) -> None:
    """Train with a progress bar; exits with status 1 on Ctrl-C, after saying how to go on."""
    images = len(fit.data.train)
    print(
        f"{fit.config.name}: {images} images of {len(fit.config.classes)} classes at {fit.config.input_size}, "
        f"on {fit.group.size} x {fit.device.type}, {len(fit.batches)} steps an epoch"
    )
    # Without a terminal (in a log file), update the bar once a minute.
    interval = 0.5 if sys.stderr.isatty() else 60
    total, done = fit.recipe.epochs * images, fit.epochs_done * images
    try:
        with tqdm(total=total, initial=done, unit="img", mininterval=interval, maxinterval=interval) as progress:
            fit.run(progress)
    except KeyboardInterrupt:
        held = f"{fit.out / CHECKPOINT} holds {fit.epochs_done} finished epochs"
        print(f"\nstopped; {held}: go on with --resume", file=sys.stderr)
        sys.exit(1)
    except torch.OutOfMemoryError as error:
        raise CommandError(f"{error}; expected a --batch-size smaller than {fit.recipe.batch_size}") from error


def train(options: Options, device: torch.device, group: Group) -> None:
    """A whole run, in each of its processes; the first one writes the files."""
    started = time.time()
    if (options.out / CHECKPOINT).exists() and not options.resume:
        raise CommandError(f"{options.out}: holds a run already; --resume it, or choose another --out (make: RUN=)")
    start = Trained.read(options.start) if options.start else None
    teachers = [Trained.read(run) for run in options.teachers]
    options.out.mkdir(parents=True, exist_ok=True)
    data = load(options.source, options.size)
    findings = check(data)
    print_findings(findings)
    fit = prepare(options, data, start, teachers, device, group)
    run_to_the_end(fit)
    if group.rank == 0:
        write_run(fit, findings, start, teachers, started)


def write_run(
    fit: Fit, findings: dict[str, Any], start: Trained | None, teachers: list[Trained], started: float
) -> None:
    """Write ``run.json``, the record for the card; that it exists says that the run is finished."""
    on_gpu = fit.device.type == "cuda"
    record = {
        "command": command.public("train.fit", sys.argv[1:]),
        "source": Path(fit.data.source).name,
        "data_sha256": fit.data_sha256,
        "held_out_by_content": fit.data.by_content,
        "images": {name: len(split) for name, split in fit.data.splits.items()},
        "recipe": fit.recipe.model_dump(),
        "parameters": sum(p.numel() for p in fit.network.parameters()),
        "device": torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads",
        "precision": str(compute_dtype(fit.device)).removeprefix("torch."),
        "processes": fit.group.size,
        "torch": torch.__version__,
        "wall_seconds": round(time.time() - started, 1),
        "training_seconds": round(sum(epoch["seconds"] for epoch in fit.history), 1),  # with those before a resume
        "history": fit.history,
        "check": findings,
    }
    if teachers:
        record["teachers"] = [teacher.record for teacher in teachers]
    if start:
        record["start"] = start.record
    (fit.out / RUN).write_text(json.dumps(record, indent=2) + "\n")


def keep_memory() -> None:
    """Make glibc reuse large freed blocks.

    By default it returns each to the system and gets it back zeroed, page by page: a seventh of an epoch's time on a
    CPU.
    """
    m_trim_threshold, m_mmap_threshold, never = -1, -3, 2**31 - 1  # <malloc.h>
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # not in other C libraries
        mallopt(m_mmap_threshold, never)
        mallopt(m_trim_threshold, never)


def main() -> None:
    keep_memory()
    options = parse(__doc__)
    with join() as (group, device):
        train(options, device, group)


if __name__ == "__main__":
    command.run(main)
