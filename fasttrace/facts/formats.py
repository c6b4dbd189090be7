"""Reads files of facts row by row: JSON, JSON lines, CSV and parquet, each row with its place in the file."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fasttrace.errors import StoreError, first_line
from fasttrace.facts.columns import NESTED, is_read, normal

__all__ = ["Row", "Rows", "check_columns", "read_rows", "rows_of_json", "rows_of_table"]


@dataclass(frozen=True)
class Row:
    """What stands at one place of a source.

    Attributes:
        line: its place, as `Rows.unit` counts.
        values: what was found there, of any type.
        reason: why nothing could be read there; None if something was.
    """

    line: int
    values: Any = None
    reason: str | None = None


@dataclass(frozen=True)
class Rows:
    """A source, row by row.

    Attributes:
        name: of the source, for messages.
        unit: what `Row.line` counts from 1: "line" of a text file, "entry" of a JSON list on one line, "row".
        rows: in the source's order; may be gone through once.
    """

    name: str
    unit: str
    rows: Iterable[Row]


def read_rows(path: Path) -> Rows:
    """Reads a file by its ending: .json, .jsonl, .csv or .parquet.

    Raises:
        StoreError: no such file, an unknown ending, not of its format, not UTF-8, or without the columns of a fact.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise StoreError(f"{path} ends in {path.suffix!r}: facts are read from {', '.join(_READERS)}, or 'builtin'")
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise StoreError(f"{found} at {path}: expected a file of facts; check the path")
    return reader(path)


def check_columns(columns: Iterable[Any], name: str) -> None:
    """Refuses a table whose columns cannot be facts, or of which one comes twice.

    Raises:
        StoreError: prompt or subject is missing, or a column of a fact has two of the same name.
    """
    given: dict[str, list[str]] = {}
    for column in map(str, columns):
        given.setdefault(normal(column), []).append(column)
    found = ", ".join(name for names in given.values() for name in names) or "none"
    is_filled = "prompt" in given or "template" in given
    missing = [name for name, there in (("prompt", is_filled), ("subject", "subject" in given)) if not there]
    if missing and normal(NESTED) not in given:
        advice = "separate them by commas" if any(mark in found for mark in ";\t") else "rename the columns"
        raise StoreError(
            f"{name} has no column {' and no column '.join(missing)}, its columns are {found}: "
            f"expected prompt, subject and target, and if you like id, foil and relation; {advice}"
        )
    for names in given.values():
        if len(names) > 1 and is_read(names[0]):
            called = f"called {names[0]}" if len(set(names)) == 1 else f"for one thing, {' and '.join(names)}"
            raise StoreError(f"{name} has {len(names)} columns {called}: keep one of them")


def _json_file(path: Path) -> Rows:
    return rows_of_json(_text(_bytes(path), path), str(path))


def rows_of_json(text: str, name: str) -> Rows:
    """Reads a JSON list; a row's line is the one it begins on.

    Args:
        text: the JSON.
        name: of the source, for messages.

    Raises:
        StoreError: not JSON, or not a list.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise StoreError(
            f"{name} is not JSON (line {error.lineno}, column {error.colno}: {error.msg}): correct it there, "
            "or write it again; a file with one fact per line ends in .jsonl"
        ) from None
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{name} is not readable JSON ({error}): expected a list of facts") from None
    if not isinstance(values, list):
        raise StoreError(f"{name} holds one JSON {type(values).__name__}: expected a list of facts, [{{...}}, {{...}}]")
    lines = _lines_of(text, len(values))
    if len(lines) > 1 and lines[0] == lines[-1]:
        return Rows(name, "entry", _numbered(values))
    return Rows(name, "line", [Row(line, value) for line, value in zip(lines, values, strict=True)])


def _lines_of(text: str, count: int) -> list[int]:
    """The lines on which the entries of a JSON list begin; `json.loads` does not tell."""
    lines, line, counted, end, decoder = [], 1, 0, text.index("[") + 1, json.JSONDecoder()
    for _ in range(count):
        begin = _BETWEEN_ENTRIES.match(text, end).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, begin), begin
        lines.append(line)
        _, end = decoder.raw_decode(text, begin)
    return lines


def _json_lines_file(path: Path) -> Rows:
    return Rows(str(path), "line", _json_lines(_text(_bytes(path), path)))


def _json_lines(text: str) -> Iterator[Row]:
    # Not splitlines: JSON may hold other line ends, such as U+2028, as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = Row(number, json.loads(line))
        except (ValueError, RecursionError) as error:
            row = Row(number, reason=f"it is not JSON ({error}): expected one object per line")
        yield row


def _csv_file(path: Path) -> Rows:
    reader = csv.reader(io.StringIO(_text(_bytes(path), path), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader)]
    except StopIteration:
        raise StoreError(f"{path} is empty: expected a line with the columns prompt, subject and target") from None
    except csv.Error as error:
        raise StoreError(f"{path} is not CSV (line 1: {error}): its first line has to name the columns") from None
    check_columns(header, str(path))
    return Rows(str(path), "line", _csv_rows(reader, header))


def _csv_rows(reader: Any, header: list[str]) -> Iterator[Row]:
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(line, reason=f"it is not CSV ({error}): check its quotes")
            continue
        if cells:
            yield _csv_row(line, header, cells)


def _csv_row(line: int, header: list[str], cells: list[str]) -> Row:
    if len(cells) != len(header):
        reason = f"it has {len(cells)} cells for {len(header)} columns: put text that holds a comma into quotes"
        return Row(line, reason=reason)
    return Row(line, {name: cell or None for name, cell in zip(header, cells, strict=True)})


def _parquet_file(path: Path) -> Rows:
    try:
        names = pq.read_schema(path).names
        check_columns(names, str(path))
        table = pq.ParquetFile(path).read(columns=[name for name in names if is_read(name)])
        values = table.to_pylist()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is not a readable parquet file ({first_line(error)}): write it again") from error
    return Rows(str(path), "row", _numbered(values))


def rows_of_table(source: Any, name: str) -> Rows | None:
    """Reads a table of any package that hands out Arrow data, such as polars, pyarrow and duckdb.

    Args:
        source: anything.
        name: of the source, for messages.

    Returns:
        Its rows; None if it is not such a table.

    Raises:
        StoreError: its columns are not those of facts, or it has to be computed first.
    """
    kind = type(source)
    if hasattr(kind, "collect") and hasattr(kind, "lazy"):
        raise StoreError(f"found a {name}, which is not computed yet: give {name}.collect()")
    if not hasattr(kind, "__arrow_c_stream__") and not hasattr(kind, "__arrow_c_array__"):
        return None
    try:
        table = pa.table(source)
    except (TypeError, ValueError, pa.ArrowException):
        return None  # a single column
    check_columns(table.column_names, name)
    read = [column for column in table.column_names if is_read(column)]
    return Rows(name, "row", _numbered(table.select(read).to_pylist()))


def _numbered(values: Iterable[Any]) -> list[Row]:
    return [Row(number, row) for number, row in enumerate(values, start=1)]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read {path} ({error}): check that you may read it") from error


def _text(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise StoreError(
            f"{path} is not UTF-8 text (byte 0x{content[error.start]:02x} on line {line}): save it as UTF-8"
        ) from error


_BETWEEN_ENTRIES = re.compile(r"[\s,]*")
_READERS = {".json": _json_file, ".jsonl": _json_lines_file, ".csv": _csv_file, ".parquet": _parquet_file}
