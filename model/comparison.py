"""Compare the cards of two versions: figures side by side, and whether a difference is statistically significant.

The figures are those that ``python -m train.evaluate`` wrote into the cards, by runtime.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from model.artifact import FILES, ONNX, ONNX_INT8, RUNTIMES, Artifact
from model.tables import NAMED_CLASSES, Row, aligned, with_interval

Card = Mapping[str, Any]
Figures = Mapping[str, Any]
"""The entry of one runtime in ``card["metrics"]``."""

METHOD_NOTE = """\
Interval of a difference: Newcombe (1998), Statistics in Medicine 17:873, method 10, for independent samples. On the
same images a paired test would find more: a difference called significant is, one called not significant may be."""


def difference_interval(a: Figures, b: Figures) -> tuple[float, float]:
    """95 % interval of the accuracy of ``b`` minus that of ``a``, from their Wilson intervals (see ``METHOD_NOTE``)."""
    (low_a, high_a), (low_b, high_b) = a["accuracy_95"], b["accuracy_95"]
    below = math.hypot(b["accuracy"] - low_b, high_a - a["accuracy"])
    above = math.hypot(high_b - b["accuracy"], a["accuracy"] - low_a)
    difference = b["accuracy"] - a["accuracy"]
    return difference - below, difference + above


def measured(card: Card) -> bool:
    """Whether each ONNX format that the artifact has was evaluated."""
    return {runtime for runtime in (ONNX, ONNX_INT8) if FILES[runtime] in card["files"]} <= set(_metrics(card))


def losses(current: Card, candidate: Card) -> list[str]:
    """One sentence for each runtime in which ``candidate`` is significantly less accurate than ``current``."""
    return [
        f"{runtime} loses accuracy, {_change(a, b)}"
        for runtime, a, b in _shared(current, candidate)
        if difference_interval(a, b)[1] < 0
    ]


def summary(card: Card) -> Row:
    """Accuracy in FP32 and INT8, test images, calibration error, and commit, as ``SUMMARY`` names them.

    The calibration error is that of INT8; of FP32 where the artifact has no INT8.
    """
    fp32, int8 = (_metrics(card).get(runtime, {}) for runtime in (ONNX, ONNX_INT8))
    served = int8 or fp32
    return (
        _share(fp32.get("accuracy")),
        _share(int8.get("accuracy")),
        f"{served['images']:,}" if served else "-",
        _share(served.get("ece")),
        card.get("git_commit", "-")[:7],
    )


SUMMARY: Row = ("FP32", "INT8", "images", "ECE", "commit")


def compare(a: Artifact, b: Artifact) -> str:
    """A table of two artifacts and their differences, with notes on how to read it."""
    names = [artifact.tag for artifact in (a, b)]
    rows = [("", *names, "difference"), *_accuracies(a.card, b.card), *_sizes(a.card, b.card), *_per_class(a, b)]
    return "\n".join(["A, B: 95 % intervals in brackets", aligned(rows), "", _images_note(a.card, b.card), METHOD_NOTE])


def _accuracies(a: Card, b: Card) -> Iterator[Row]:
    for title in ("commit", "images"):
        yield (title, *(summary(card)[SUMMARY.index(title)] for card in (a, b)), "")
    for runtime in RUNTIMES:
        one, other = (_metrics(card).get(runtime) for card in (a, b))
        yield (f"accuracy {runtime}", _accuracy(one), _accuracy(other), _change(one, other) if one and other else "-")
    for runtime in RUNTIMES:
        one, other = (_metrics(card).get(runtime, {}).get("ece") for card in (a, b))
        yield (f"ECE {runtime}", _share(one), _share(other), _points(one, other))


def _sizes(a: Card, b: Card) -> Iterator[Row]:
    for name in FILES.values():
        one, other = (card["files"][name]["bytes"] / 1e6 if name in card["files"] else 0.0 for card in (a, b))
        yield (name, f"{one:.2f} MB", f"{other:.2f} MB", f"{other - one:+.2f} MB")


def _per_class(a: Artifact, b: Artifact) -> Iterator[Row]:
    """Recall of each class; of many, those in which it changed most. A class that only one knows has no difference.

    In INT8, or the nearest format that both were measured in: a network trained elsewhere may have no INT8.
    """
    shared = [runtime for runtime, _, _ in _shared(a.card, b.card)]
    runtime = shared[-1] if shared else ONNX_INT8
    shares = [_metrics(artifact.card).get(runtime, {}).get("per_class", {}) for artifact in (a, b)]
    names = list(dict.fromkeys((*a.config.classes, *b.config.classes)))
    if len(names) > NAMED_CLASSES:
        yield (f"the {NAMED_CLASSES} of {len(names):,} classes that changed most:", "", "", "")
        changes = {name: abs(shares[1][name] - shares[0][name]) for name in names if all(name in s for s in shares)}
        names = sorted(names, key=lambda name: changes.get(name, 0), reverse=True)[:NAMED_CLASSES]
    for name in names:
        one, other = (share.get(name) for share in shares)
        yield (f"{name} {runtime}", _share(one), _share(other), _points(one, other))


def _images_note(a: Card, b: Card) -> str:
    for name, card in (("A", a), ("B", b)):
        if not _metrics(card):
            return f"{name} was not measured: make evaluate."
    data = [card.get("training", {}).get("data_sha256") for card in (a, b)]
    if data[0] is not None and data[0] == data[1]:
        return "Both were measured on the same test images (equal data_sha256)."
    return "NOT measured on the same data (data_sha256 differs): a difference may be that of the test images."


def _shared(a: Card, b: Card) -> Iterator[tuple[str, Figures, Figures]]:
    """The figures of both cards, for each runtime in which both were measured."""
    for runtime in RUNTIMES:
        if runtime in _metrics(a) and runtime in _metrics(b):
            yield runtime, _metrics(a)[runtime], _metrics(b)[runtime]


def _metrics(card: Card) -> Mapping[str, Figures]:
    metrics: Mapping[str, Figures] = card.get("metrics", {})
    return metrics


def _change(a: Figures, b: Figures) -> str:
    low, high = difference_interval(a, b)
    verdict = "not significant" if low <= 0 <= high else "significant"
    return f"{_points(a['accuracy'], b['accuracy'])} ({100 * low:+.2f} to {100 * high:+.2f}), {verdict}"


def _accuracy(figures: Figures | None) -> str:
    if figures is None:
        return "-"
    return with_interval(figures)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _points(a: float | None, b: float | None) -> str:
    return "-" if a is None or b is None else f"{100 * (b - a):+.2f} points"
