"""Write the model card from the measured figures.

    python -m train.report ARTIFACT [ARTIFACT ...] SOURCE --out docs/model-card.md
        [--data "origin and licence"] [--also CARD ...]

Figures are read from the artifacts' cards, as written by ``train.fit``, ``train.export``, ``train.evaluate``,
``train.robustness`` and ``train.foreign``; what was not measured has no section. The test images of SOURCE are needed
for the pictures of mistakes, and for the accuracy of several artifacts as an ensemble. Artifacts trained on other data
than the first are left out. Plots go to ``images/`` beside the page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from model.artifact import ONNX_INT8, Artifact
from model.classifier import calibrated, verdicts
from model.ensemble import Ensemble
from model.preprocess import Pixels
from model.runtimes import create
from model.tables import NAMED_CLASSES, markdown
from train import command, plots, sections
from train.command import CommandError
from train.data import CIFAR10, Data, Split, is_part_of
from train.measure import THREADS, load_own_data, run_runtime
from train.sections import Page, detailed, percent

ORIGINS = {
    CIFAR10: "CIFAR-10, a labelled part of the 80 Million Tiny Images: Krizhevsky, A. (2009), *Learning Multiple "
    "Layers of Features from Tiny Images*, University of Toronto. It comes without a licence; its pictures were "
    "collected from the web and belong to their photographers."
}
"""Origins and licences, by the name of the source or of the data set that it is part of."""
MISTAKES, MISTAKEN_CLASSES = 5, 10
"""How many mistakes are shown per class, and for how many classes, the worst first."""
CONFUSED_PAIRS = 3


def worst_mistakes(artifact: Artifact, test: Split) -> dict[str, list[tuple[Pixels, str]]]:
    """The most confident mistakes of each true class, each with its verdict, for the classes with the most mistakes."""
    runtime = create(detailed(artifact), artifact, THREADS)
    probabilities = calibrated(run_runtime(runtime, test.images), artifact.config.temperature)
    verdicts, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = verdicts != test.labels
    names = plots.drawable(artifact.config.classes)
    by_class = {}
    for index in np.argsort(-np.bincount(test.labels[wrong], minlength=probabilities.shape[1]))[:MISTAKEN_CLASSES]:
        members = np.flatnonzero(wrong & (test.labels == index))
        chosen = members[np.argsort(-confidence[members])][:MISTAKES]
        if len(chosen):
            by_class[names[index]] = [(test.images[i], f"{names[verdicts[i]]} {confidence[i]:.2f}") for i in chosen]
    return by_class


def mistakes(page: Page, label: str, artifact: Artifact, test: Split) -> str:
    rows = worst_mistakes(artifact, test)
    if not rows:
        return "### Mistakes\n\nNone on the test images."
    picture = page.picture(plots.mistakes(rows), f"{label}-mistakes", "Confident mistakes of each class")
    return f"### Mistakes\n\nThe most confident mistakes of each class, each under its verdict.\n\n{picture}"


def ensemble_of(artifacts: dict[str, Artifact], test: Split) -> dict[str, Any] | None:
    """Accuracy of all that have figures as an ensemble, measured now, and its speed; None if fewer than two have.

    Of all, because test images must not choose its members. The speed is derived from the cards, since one core runs
    one member after the other: measured now, it could be that of another machine.
    """
    figures = {label: artifact.metrics.get(ONNX_INT8, {}) for label, artifact in artifacts.items()}
    members = [label for label, found in figures.items() if "speed" in found]
    if len(members) < 2:
        return None
    ensemble = Ensemble([artifacts[label] for label in members])
    said = verdicts(run_runtime(ensemble.engine(ONNX_INT8, THREADS), test.images))
    rate = 1 / sum(1 / figures[label]["speed"]["images_per_s"] for label in members)
    name = f"{' + '.join(members)} (speed derived)"
    return {"name": name, "accuracy": float((said == test.labels).mean()), "images_per_s": round(rate)}


def model(page: Page, label: str, artifact: Artifact, data: Data) -> str:
    """All sections about one artifact."""
    config = artifact.config
    height, width = config.input_size
    names = f": {', '.join(config.classes)}" if len(config.classes) <= NAMED_CLASSES else ""
    about = (
        f"A convolutional network with {artifact.card['training']['parameters']:,} parameters that tells "
        f"{len(config.classes)} classes apart in images of {width}x{height} pixels{names}."
    )
    parts = [
        f"## {label}\n\n{about}",
        sections.accuracy(page, label, artifact),
        sections.calibration(page, label, artifact),
        sections.prediction_sets(artifact),
        sections.foreign(artifact),
        sections.corruptions(page, label, artifact),
        sections.photographs(artifact),
        mistakes(page, label, artifact, data.test),
        "### Limits of use\n\n" + "\n".join(f"- {limit}" for limit in limits(artifact)),
        sections.training(page, label, artifact),
        sections.provenance(artifact),
    ]
    return "\n\n".join(filter(None, parts))


def limits(artifact: Artifact) -> list[str]:
    """Limits of the model, with the figures behind them."""
    config, metrics = artifact.config, artifact.metrics
    figures = metrics[detailed(artifact)]
    # From the counts, as in the table of classes: rounding an already rounded share may differ.
    found = dict(zip(config.classes, np.diag(figures["confusion"]) / np.sum(figures["confusion"], axis=1), strict=True))
    weakest = min(found, key=found.__getitem__)
    pairs = "; ".join(confused_pairs(figures, config.classes)) or "none"
    height, width = config.input_size
    return [
        f"Weakest class: {weakest}, {percent(found[weakest])} found. Most often confused: {pairs}.",
        "An image of anything else is assigned one of these classes too; low confidence is a hint, not proof.",
        f"Every image is resized to {width}x{height} pixels: small or off-centre objects are lost. "
        + on_photographs(metrics.get("photographs")),
        on_corruptions(metrics.get("robustness")),
        "Except on photographs and foreign images, all figures are for data from this one source: measure on your own "
        "before anything depends on a verdict.",
    ]


def on_photographs(metrics: dict[str, Any] | None) -> str:
    if metrics is None:
        return "Photographs were not measured."
    return f"Of the photographs, {percent(metrics['accuracy'])} are classified correctly."


def on_corruptions(metrics: dict[str, Any] | None) -> str:
    if metrics is None:
        return "Noise, blur, weather and compression were not measured."
    lowest = {name: min(one["by_severity"]) for name, one in metrics["corruptions"].items()}
    name = min(lowest, key=lowest.__getitem__)
    return (
        f"Noise, blur, weather and compression cost accuracy: {percent(metrics['clean']['accuracy'])} of clean images "
        f"are classified correctly, {percent(metrics['accuracy'])} of corrupted ones, and {percent(lowest[name])} "
        f"under the worst corruption, {name.replace('_', ' ')}, at its worst severity."
    )


def confused_pairs(figures: dict[str, Any], classes: tuple[str, ...]) -> list[str]:
    """The most frequent confusions, as ``CONFUSED_PAIRS`` phrases at most."""
    errors = np.asarray(figures["confusion"])
    totals = errors.sum(axis=1)
    errors = errors - np.diag(np.diag(errors))
    worst_first = np.argsort(-errors, axis=None)[:CONFUSED_PAIRS]
    pairs = [np.unravel_index(index, errors.shape) for index in worst_first]
    return [
        f"{classes[true]} taken for {classes[said]} ({errors[true, said]} of {totals[true]})"
        for true, said in pairs
        if errors[true, said]
    ]


def about_data(artifact: Artifact, note: str) -> str:
    """Origin, licence, counts, and the findings of ``train.check``."""
    training = artifact.card["training"]
    known = [text for name, text in ORIGINS.items() if is_part_of(training["source"], name)]
    parts = ["## Data", f"`{training['source']}`, SHA-256 of its pixels and labels `{training['data_sha256']}`."]
    parts += [note] if note else known or ["Its origin and licence were not given to `train.report`."]
    findings = training.get("check")
    if findings is None:
        return "\n\n".join([*parts, markdown(("split", "images"), [*training["images"].items()])])
    rows = [(split, sum(c.values()), min(c.values()), max(c.values())) for split, c in findings["images"].items()]
    parts.append(markdown(("split", "images", "smallest class", "largest class"), rows))
    sizes = findings["sizes"]
    near = findings["nearly_in_training"]
    parts.append(
        f"Before training, `train.check` found {findings['broken']['count']} broken files, "
        f"{findings['same_pixels_in_two_splits']['count']} images in two splits, "
        f"{findings['same_pixels_two_classes']['count']} images in two classes, and {near['test']['count']} test and "
        f"{near['val']['count']} validation images that look almost like a training image. Widths are "
        f"{sizes['width'][0]} to {sizes['width'][2]} pixels, heights {sizes['height'][0]} to {sizes['height'][2]}."
    )
    return "\n\n".join(parts)


def labels(artifacts: list[Artifact]) -> dict[str, Artifact]:
    """Each artifact by its name, or by its folder's name if several share it."""
    names = [artifact.config.name for artifact in artifacts]
    result = {
        name if names.count(name) == 1 else artifact.path.name: artifact
        for name, artifact in zip(names, artifacts, strict=True)
    }
    if len(result) < len(artifacts):
        raise CommandError(f"artifacts {', '.join(result)}: expected other names, or folders of other names")
    return result


def of_the_same_data(first: Artifact, others: list[Artifact]) -> Iterator[Artifact]:
    """Those of ``others`` trained on the same data as ``first``; prints each that is left out."""
    expected = first.card["training"]["data_sha256"]
    for artifact in others:
        if artifact.card["training"]["data_sha256"] == expected:
            yield artifact
        else:
            print(f"{artifact.path}: left out, for it was trained on other data than {first.path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+", metavar="ARTIFACT")
    parser.add_argument("source")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="", help="origin and licence of the data, as the page will tell it")
    parser.add_argument(
        "--also", type=Path, nargs="*", default=[], metavar="CARD", help="of models to compare accuracy and speed with"
    )
    options = parser.parse_args()
    first, *others = [Artifact.load(path) for path in options.artifacts]
    data = load_own_data(first, options.source)
    artifacts = labels([first, *of_the_same_data(first, others)])
    for artifact in artifacts.values():
        sections.measured(artifact)  # raises before anything is drawn
    page = Page(options.out)
    about = "Generated by `python -m train.report` from the figures in `card.json`: measure again instead of editing."
    cards = {label: artifact.card for label, artifact in artifacts.items()}
    cards |= {
        f"{path.stem} (not shipped)": card
        for path in options.also
        if (card := json.loads(path.read_text()))["training"]["data_sha256"] == first.card["training"]["data_sha256"]
    }
    parts = [f"# Model card\n\n{about}", sections.frontier(page, cards, ensemble_of(artifacts, data.test))]
    parts += [model(page, label, artifact, data) for label, artifact in artifacts.items()]
    parts.append(about_data(first, options.data))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n\n".join(filter(None, parts)) + "\n")
    print(f"{options.out}: {', '.join(artifacts)}")


if __name__ == "__main__":
    command.run(main)
