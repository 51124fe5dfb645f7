"""The plots of the model card: small PNG files with a light background, so that they are legible on dark pages too."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from PIL import Image

from model.preprocess import Pixels

GROUND, INK, GRID = "#f6f8fa", "#1f2328", "#d0d7de"
BLUE, ORANGE, GREEN, RED = "#0969da", "#bc4c00", "#1a7f37", "#cf222e"
FAMILY_COLOURS = (BLUE, GREEN, ORANGE, "#8250df")
DPI = 100
COLOURS = 256
"""Size of the PNG's palette: plots need few colours, and photographs of 32 pixels look no different."""
NUMBERED_CLASSES = 20
"""Most classes for which the cells of the confusion matrix show their counts."""

CAPTION_LETTER = 0.06
"""Inches for a letter of a caption: where names are long, neighbouring captions would overlap."""

LABELLED_CLASSES = 50
"""Most classes for which the axes of the confusion matrix have room for names: else they show a few indices."""


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` as a PNG with a palette, a third of the size of one without it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, facecolor=GROUND, metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def _axes(width: float, height: float, title: str, **labels: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Axes = figure.subplots()
    _style(axes)
    axes.set(title=title, **labels)
    return figure, axes


def _style(axes: Axes) -> None:
    axes.set_facecolor(GROUND)
    axes.tick_params(colors=INK)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def reliability(bins: dict[str, list[float]]) -> Figure:
    """Reliability diagram: accuracy against confidence, and below it how many images have that confidence."""
    figure = Figure(figsize=(5, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    count = len(bins["images"])
    middles = (np.arange(count) + 0.5) / count
    filled = np.asarray(bins["images"]) > 0
    for axes in (upper, lower):
        _style(axes)
    upper.bar(middles[filled], np.asarray(bins["accuracy"])[filled], 0.9 / count, color=BLUE, label="accuracy")
    upper.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1, label="perfectly calibrated")
    upper.plot(
        np.asarray(bins["confidence"])[filled], np.asarray(bins["accuracy"])[filled], "o", color=ORANGE, markersize=4
    )
    upper.set(title="Reliability", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    upper.legend(frameon=False, loc="upper left")
    lower.bar(middles, bins["images"], 0.9 / count, color=GREEN)
    lower.set(xlabel="confidence", ylabel="images", yscale="symlog")
    return figure


def drawable(classes: Sequence[str]) -> list[str]:
    """Class names, or "class N" where the font lacks a letter. Dollar signs are escaped, or would start mathematics."""
    glyphs = get_font(findfont(FontProperties())).get_charmap()
    return [
        name.replace("$", r"\$") if all(ord(letter) in glyphs for letter in name) else f"class {number}"
        for number, name in enumerate(classes)
    ]


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """Confusion matrix: rows are the true classes, colour shows the share of its row."""
    counts = np.asarray(matrix)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    side = max(3.5, min(9, 0.55 * len(classes) + 1.5))
    figure, axes = _axes(side, side, "Confusion matrix", xlabel="predicted class", ylabel="true class")
    axes.grid(visible=False)
    axes.imshow(shares**0.5, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= LABELLED_CLASSES:
        ticks, names = range(len(classes)), drawable(classes)
        axes.set_xticks(ticks, names, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(ticks, names)
    else:
        axes.set(xlabel="index of the predicted class", ylabel="index of the true class")
    if len(classes) <= NUMBERED_CLASSES:
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.4 else INK
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    return figure


def training(history: list[dict[str, float]]) -> Figure:
    """Loss and accuracies of every epoch, over all runs in sequence."""
    figure, axes = _axes(6.5, 3.5, "Training", xlabel="epoch", ylabel="accuracy")
    epochs = range(1, len(history) + 1)
    for key, colour, label in (("train_accuracy", BLUE, "training"), ("val_accuracy", ORANGE, "validation")):
        axes.plot(epochs, [epoch[key] for epoch in history], color=colour, label=label)
    losses = axes.twinx()
    losses.plot(epochs, [epoch["loss"] for epoch in history], color=GREEN, linestyle=":", label="loss")
    losses.set(ylabel="loss (dotted)", yscale="log")
    losses.spines["top"].set_visible(False)
    axes.legend(frameon=False, loc="lower center")
    return figure


def corruptions(robustness: dict[str, Any]) -> Figure:
    """A bar for the mean of each corruption, a dot for each severity, a dashed line for clean images."""
    names = list(robustness["corruptions"])
    families = list(robustness["families"])
    figure, axes = _axes(
        6.5, 0.28 * len(names) + 1.2, "Accuracy under corruption", xlabel="accuracy (dashed line: clean images)"
    )
    for row, name in enumerate(names):
        one = robustness["corruptions"][name]
        colour = FAMILY_COLOURS[families.index(one["family"]) % len(FAMILY_COLOURS)]
        axes.barh(row, float(np.mean(one["by_severity"])), color=colour, alpha=0.55)
        axes.plot(one["by_severity"], [row] * len(one["by_severity"]), "o", color=colour, markersize=3)
    axes.axvline(robustness["clean"]["accuracy"], color=INK, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    return figure


def frontier(points: list[dict[str, Any]]) -> Figure:
    """Accuracy against speed, each point with its name."""
    figure, axes = _axes(6, 4, "Accuracy against speed, INT8", xlabel="images/s on one core", ylabel="accuracy")
    middle = max(point["images_per_s"] for point in points) / 2
    for i, point in enumerate(sorted(points, key=lambda point: point["images_per_s"])):
        place = (point["images_per_s"], point["accuracy"])
        axes.plot(*place, "o", color=BLUE)
        # Labels point away from the edge, and alternate above and below, because neighbours may be close.
        side, height = ("left" if place[0] < middle else "right"), ("top" if i % 2 else "bottom")
        offset = {"left": 5, "right": -5}[side], {"top": -5, "bottom": 5}[height]
        axes.annotate(point["name"], place, offset, textcoords="offset points", ha=side, va=height)
    axes.set_xlim(left=0)
    axes.margins(0.15)
    return figure


def mistakes(rows: dict[str, list[tuple[Pixels, str]]]) -> Figure:
    """A row of captioned images for each class."""
    columns = max(map(len, rows.values()))
    longest = max(len(caption) for images in rows.values() for _, caption in images)
    figure = Figure(figsize=(max(1.0, CAPTION_LETTER * longest) * columns + 1.1, 1.1 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for axes in line:
            axes.set_axis_off()
        line[0].text(-0.25, 0.5, name, transform=line[0].transAxes, ha="right", va="center", color=INK, fontsize=8)
        for axes, (image, caption) in zip(line, images, strict=False):
            axes.imshow(image, interpolation="nearest")
            axes.set_title(caption, fontsize=7, color=RED, pad=2)
    return figure
