"""Rows as CSV, JSON Lines or Parquet, by the suffix of the file; or as a table for people."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from client.errors import ClientError
from client.rows import Row
from model.tables import aligned

ROW_GROUP = 10_000
"""Rows of a Parquet file held in memory at once."""
NOT_IN_TABLE = {"predicted_class", "model", "error_code", "error_message"}
CONTROLS = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160))}
"""Escapes for the control characters that a terminal obeys; a file name may contain them."""


def check(out: Path) -> None:
    """Raise ``ClientError`` if ``out`` could not be written in the end: before the work, not after it."""
    if out.suffix not in WRITERS:
        raise ClientError(f"{out}: expected a name that ends in one of {', '.join(WRITERS)}")
    if out.suffix == ".parquet" and not find_spec("pyarrow"):
        raise ClientError(f"{out}: Parquet needs the package pyarrow: pip install pyarrow")
    if not out.parent.is_dir():
        raise ClientError(f"{out}: there is no folder {out.parent}")


def write(out: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Write ``rows`` to ``out`` atomically: it is complete or not there."""
    temporary = out.with_name(out.name + ".tmp")
    WRITERS[out.suffix](temporary, columns, rows)
    temporary.replace(out)


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Booleans and lists as in JSON; null is an empty cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            writer.writerow([json.dumps(cell) if isinstance(cell, bool | list) else cell for cell in row.values()])


def _write_jsonl(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_parquet(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds: dict[str, Any] = {
        "predicted_class": pa.int32(),
        "confidence": pa.float64(),
        "in_distribution": pa.bool_(),
        "prediction_set": pa.list_(pa.string()),
        "probabilities": pa.list_(pa.float64()),
    }
    schema = pa.schema([(column, kinds.get(column, pa.string())) for column in columns])
    # Opened here: pyarrow accepts only paths in UTF-8.
    with path.open("wb") as file, pq.ParquetWriter(file, schema) as writer:
        for group in _groups(rows):
            writer.write_table(pa.Table.from_pylist(group, schema))


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    remaining = iter(rows)
    while group := list(islice(remaining, ROW_GROUP)):
        yield group


WRITERS: dict[str, Callable[[Path, Sequence[str], Iterable[Row]], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}


def table(columns: Sequence[str], rows: Iterable[Row]) -> str:
    """The columns that a person looks for, aligned."""
    shown = [column for column in columns if column not in NOT_IN_TABLE]
    lines = [[*(_cell(row[column]) for column in shown), _error(row)] for row in rows]
    return aligned([[*shown, "error"], *([cell.translate(CONTROLS) for cell in line] for line in lines)])


def _cell(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case list():
            return " ".join(map(_cell, value))
        case float():
            return f"{value:.4f}"
        case _:
            return str(value)


def _error(row: Row) -> str:
    return f"{row['error_code']}: {row['error_message']}" if row["error_code"] else ""
