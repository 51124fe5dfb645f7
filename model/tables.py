"""Tables, in columns for a terminal and in Markdown, and how all of them write intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Sequence[str]
NAMED_CLASSES = 20
"""Most classes that are listed one by one; the confusion matrix of a thousand would be 6 MB of text."""


def aligned(rows: Sequence[Row]) -> str:
    """``rows`` in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def markdown(head: Row, rows: Iterable[Sequence[object]]) -> str:
    """``rows`` under ``head`` as a Markdown table (GitHub Flavored Markdown, 4.10)."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def with_interval(figures: Mapping[str, Any]) -> str:
    """``accuracy`` and, in brackets, ``accuracy_95`` of ``figures`` from a card."""
    return f"{figures['accuracy']:.2%} ({between(figures['accuracy_95'])})"


def between(interval: Sequence[float]) -> str:
    """An interval of shares (0 to 1), in percent."""
    return f"{interval[0]:.2%} to {interval[1]:.2%}"
