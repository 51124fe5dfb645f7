"""The sections of the model card: an artifact's card in, Markdown out; empty for what was not measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from model.artifact import FILES, ONNX_INT8, RUNTIMES, Artifact
from model.classifier import Classifier
from model.tables import NAMED_CLASSES, between, markdown
from train import plots
from train.command import CommandError
from train.metrics import Reliability, accuracy_interval, calibration_error_by_chance
from train.runs import runs


@dataclass(frozen=True)
class Page:
    """Path of the page; plots go to ``images/`` beside it, named after the model."""

    out: Path

    def picture(self, figure: Figure, name: str, alt: str) -> str:
        """Save ``figure`` and return the Markdown that shows it."""
        path = self.out.parent / "images" / f"{name}.png"
        plots.save(figure, path)
        return f"![{alt}](images/{path.name})"


def percent(share: float) -> str:
    return f"{share:.2%}"


def measured(artifact: Artifact) -> list[str]:
    """The runtimes with figures; raises ``CommandError`` if there are none."""
    names = [name for name in RUNTIMES if name in artifact.metrics]
    if not names:
        raise CommandError(f"{artifact.path}: its card has no figures; run python -m train.evaluate first")
    return names


def detailed(artifact: Artifact) -> str:
    """The runtime that the page details: the one that serves on a CPU, if it was measured."""
    return measured(artifact)[-1]


def accuracy(page: Page, label: str, artifact: Artifact) -> str:
    rows = []
    for name in measured(artifact):
        figures = artifact.metrics[name]
        megabytes = artifact.card["files"][FILES[name]]["bytes"] / 1e6
        rows.append(
            (
                f"`{name}`",
                percent(figures["accuracy"]),
                between(figures["accuracy_95"]),
                figures["images"],
                percent(figures["ece_raw"]),
                percent(figures["ece"]),
                rate(figures["speed"]) if "speed" in figures else "",
                f"{megabytes:.1f} MB",
            )
        )
    head = ("runtime", "accuracy", "95 % interval", "n", "ECE raw", "ECE scaled", "images/s, one core", "file")
    name = detailed(artifact)
    figures = artifact.metrics[name]
    matrix = plots.confusion(figures["confusion"], artifact.config.classes)
    return "\n\n".join(
        [
            "### Accuracy",
            f"On the test images, without test-time augmentation{speed(figures)}." + agreement(artifact),
            markdown(head, rows),
            per_class(name, figures),
            page.picture(matrix, f"{label}-confusion", "Confusion matrix"),
        ]
    )


def agreement(artifact: Artifact) -> str:
    """A sentence about how INT8 compares with FP32; empty without INT8."""
    if ONNX_INT8 not in artifact.runtimes:
        return ""
    return f" INT8 agrees with FP32 on {artifact.card['validation']['agreement']:.1%} of the validation images."


def speed(figures: dict[str, Any]) -> str:
    """A clause about how the speed was measured; empty if it was not."""
    if "speed" not in figures:
        return ""
    how = figures["speed"]
    return f"; the speed is of batches of {how['batch']} on {how['gpu'] if 'gpu' in how else 'one core, ' + how['cpu']}"


def rate(speed: dict[str, Any]) -> str:
    """Images per second, with the device if it is a GPU."""
    return f"{speed['images_per_s']} ({speed['gpu']})" if "gpu" in speed else str(speed["images_per_s"])


def prediction_sets(artifact: Artifact) -> str:
    sets = artifact.metrics[detailed(artifact)].get("prediction_sets")
    if sets is None:
        return ""
    rows = [
        (f"{float(level):.0%}", percent(found["coverage"]), f"{found['size']:.2f}") for level, found in sets.items()
    ]
    warning = Classifier(artifact.config, artifact.reference(artifact.cpu_runtime)).prediction_set_warning
    return "\n\n".join(
        [
            "### Prediction sets",
            "Split conformal prediction: how often the set of classes contains the true one, and how many it contains"
            f"{f' ({warning})' if warning else ''}.",
            markdown(("level", "coverage", "classes, mean"), rows),
        ]
    )


def per_class(runtime: str, figures: dict[str, Any]) -> str:
    """A table of the classes; of many, the ``NAMED_CLASSES`` that are found least."""
    matrix = np.asarray(figures["confusion"])
    names = list(figures["per_class"])
    recall = np.diag(matrix) / matrix.sum(axis=1)
    title, shown = f"Per class, with `{runtime}`:", np.arange(len(names))
    if len(names) > NAMED_CLASSES:
        weakest = f"The {NAMED_CLASSES} of {len(names)} classes that are found least"
        title = f"{weakest}, with `{runtime}`; `card.json` has all:"
        shown = np.argsort(recall, kind="stable")[:NAMED_CLASSES]
    rows = []
    for index in shown:
        hits, count, verdicts = (int(v) for v in (matrix[index, index], matrix[index].sum(), matrix[:, index].sum()))
        precision = percent(hits / verdicts) if verdicts else "never predicted"
        rows.append((names[index], percent(hits / count), between(accuracy_interval(hits, count)), count, precision))
    return f"{title}\n\n{markdown(('class', 'recall', '95 % interval', 'n', 'precision'), rows)}"


def calibration(page: Page, label: str, artifact: Artifact) -> str:
    figures = artifact.metrics[detailed(artifact)]
    if "reliability" not in figures:
        return ""
    found = Reliability.of(figures)
    return "\n\n".join(
        [
            "### Calibration",
            f"Expected calibration error (ECE) {percent(figures['ece'])} in {len(found.images)} bins, where perfect "
            f"calibration would show {percent(calibration_error_by_chance(found))} by chance; "
            f"{percent(figures['ece_raw'])} before scaling with the temperature {artifact.config.temperature}, fitted "
            "on validation images.",
            page.picture(plots.reliability(figures["reliability"]), f"{label}-reliability", "Reliability diagram"),
        ]
    )


def foreign(artifact: Artifact) -> str:
    metrics = artifact.metrics.get("foreign")
    if metrics is None:
        return ""
    rows = [(kind, of["images"], f"{of['auroc']:.3f}", f"{of['told']:.1%}") for kind, of in metrics["kinds"].items()]
    warning = Classifier(artifact.config, artifact.reference(artifact.cpu_runtime)).foreign_warning
    return "\n\n".join(
        [
            "### Foreign images",
            "How well images of none of the classes (out of distribution) are told apart from test images: mean AUROC "
            f"{metrics['auroc_mean']:.3f}. Of {metrics['images']:,} test images {metrics['told_wrongly']:.1%} are "
            f"called foreign by default{f' ({warning})' if warning else ''}.",
            markdown(("kind", "n", "AUROC", "called foreign by default"), rows),
        ]
    )


def corruptions(page: Page, label: str, artifact: Artifact) -> str:
    metrics = artifact.metrics.get("robustness")
    if metrics is None:
        return ""
    summary = {"mean over the families": metrics, "clean": metrics["clean"], **metrics["families"]}
    summary["the fifteen of the benchmark"] = metrics["benchmark_15"]
    rows = [(name, percent(f["accuracy"]), between(f["accuracy_95"])) for name, f in summary.items()]
    picture = page.picture(plots.corruptions(metrics), f"{label}-corruptions", "Accuracy under each corruption")
    return "\n\n".join(
        [
            "### Corruptions",
            f"{metrics['images']} test images with `{metrics['runtime']}`, under {len(metrics['corruptions'])} "
            "corruptions at the five severities of CIFAR-10-C (Hendrycks & Dietterich, 2019, arXiv:1903.12261). "
            "`train/corruptions.py` reimplements them: figures are close to those on the published files, not equal.",
            markdown(("images", "accuracy", "95 % interval"), rows),
            picture,
        ]
    )


def photographs(artifact: Artifact) -> str:
    metrics = artifact.metrics.get("photographs")
    if metrics is None:
        return ""
    every = {"all": metrics, **metrics["per_class"]}
    rows = [(name, percent(f["accuracy"]), between(f["accuracy_95"]), f["images"]) for name, f in every.items()]
    return "\n\n".join(
        [
            "### Photographs",
            f"`{metrics['source']}`: photographs of any size, preprocessed as in the service, with "
            f"`{metrics['runtime']}`.",
            markdown(("class", "accuracy", "95 % interval", "n"), rows),
        ]
    )


def training(page: Page, label: str, artifact: Artifact) -> str:
    record = artifact.card["training"]
    if "network" in record:
        origin = f"Trained elsewhere: `{record['network']}`, SHA-256 `{record['network_sha256']}`, converted with"
        return "\n\n".join(["### Training", origin, f"```console\n$ {record['command']}\n```"])
    every = runs(record)
    history = [epoch for run in every for epoch in run["history"]]
    parts = ["### Training"]
    for run in every:
        values = ", ".join(f"{key} {value}" for key, value in run["recipe"].items())
        minutes = run["training_seconds"] / 60
        parts += [f"```console\n$ {run['command']}\n```", f"On {run['device']}, {minutes:.1f} minutes: {values}."]
    return "\n\n".join([*parts, page.picture(plots.training(history), f"{label}-training", "Training log")])


def provenance(artifact: Artifact) -> str:
    card = artifact.card
    versions = ", ".join(f"{name} {number}" for name, number in card["versions"].items())
    rows = [(f"`{name}`", f"{file['bytes']:,}", f"`{file['sha256']}`") for name, file in card["files"].items()]
    about = f"Version `{artifact.version}`, exported at commit `{card['git_commit']}` with {versions}."
    return "\n\n".join(["### Provenance", about, markdown(("file", "bytes", "SHA-256"), rows)])


def frontier(page: Page, cards: dict[str, Any], ensemble: dict[str, Any] | None) -> str:
    """Accuracy against speed of every model, from its card, and of the ``ensemble``; empty for one model."""
    points = []
    for label, card in cards.items():
        figures = card["metrics"].get(ONNX_INT8, {})
        if "speed" in figures:
            points.append({"name": label, "accuracy": figures["accuracy"], **figures["speed"]})
    if ensemble:
        points.append(ensemble)
    if len(points) < 2:
        return ""
    rows = [(point["name"], percent(point["accuracy"]), point["images_per_s"]) for point in points]
    picture = page.picture(plots.frontier(points), "frontier", "Accuracy against speed")
    head = ("model", "accuracy, INT8", "images/s, one core")
    return "\n\n".join(["## Accuracy against speed", markdown(head, rows), picture])
