"""Exports: a store's facts as the files of other programs.

``rome-npz`` writes what ROME's ``causal_trace.py`` writes, one file per fact and stream that ROME knows:

    OUT/cases/knowledge_12.npz  OUT/cases/knowledge_12_mlp.npz  OUT/cases/knowledge_12_attn.npz
    OUT/cases.csv               which number is which fact

A fact's number is its id when every id that is written is a whole number, as in ROME's own facts; otherwise facts are
numbered from 0 in the store's order. When both `mlp_activation` and `mlp_output` were traced, which ROME gives one
name, the first is written.

``csv`` writes the tutorial's CSVs, with columns ``layer,pos,prob`` and one for each other metric, one folder per fact:

    OUT/12/block_output.csv ...
    OUT/facts.csv               every fact, its folder, probabilities, or why it was skipped

A folder has the fact's id as its name, with characters that are not safe in file names written as ``%2F``.

Where facts are missing or left out, OUT/coverage.txt says so. The table of facts is the mark of a whole export: it
comes last, and what an earlier export has in its table is removed before. Texts in it that a spreadsheet would take for
formulas, those that begin with = + - @, a tab or a line break and are no numbers, begin with an apostrophe there;
``spreadsheet_safe=False`` writes them as they are.
"""

import csv
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fasttrace.checks import flag, instance, path_of
from fasttrace.checks import shown as shown_value
from fasttrace.errors import StoreError
from fasttrace.experiment.cells import SITES
from fasttrace.files.names import is_plain, plain_names
from fasttrace.files.received import NONSENSE, expect, read_regular
from fasttrace.files.sets import one_set
from fasttrace.files.writing import atomic_write
from fasttrace.results.record import Record
from fasttrace.results.result import TraceResult
from fasttrace.results.rome import ROME_KINDS, rome_file_name
from fasttrace.runs.coverage import Coverage
from fasttrace.runs.parts import FACT_COLUMNS
from fasttrace.runs.store import Store

__all__ = ["EXPORTS", "export"]

COVERAGE_FILE = "coverage.txt"
TEXT_COLUMNS = (*FACT_COLUMNS, "reason", "target_token")
FORMULA = re.compile(r"[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
"""What a text begins with that a spreadsheet computes; the wide signs do it too where such are typed."""
NUMBER = re.compile(r"[+-]?[0-9]+([.][0-9]+)?([eE][+-]?[0-9]+)?")


def export(
    store: Store,
    out: str | os.PathLike[str],
    kind: str,
    *,
    shown: Coverage | None = None,
    spreadsheet_safe: bool = True,
) -> list[Path]:
    """Writes a store's facts as files of another program; an earlier export in the folder is replaced.

    Args:
        store: what to write; it may be unfinished.
        out: the folder, made when missing; files that are no export are left alone.
        kind: one of `EXPORTS`: "rome-npz" or "csv".
        shown: which facts, see `Store.records`.
        spreadsheet_safe: put an apostrophe before texts that a spreadsheet would take for formulas.

    Returns:
        The paths written, those that list the facts last.

    Raises:
        StoreError: unknown kind, no traced facts, no stream that ROME knows, a folder that has files of others under
            the names of an export, or one that cannot be written to.
    """
    if not isinstance(kind, str) or kind not in EXPORTS:
        raise StoreError(f"unknown format {shown_value(kind)}: choose from {', '.join(EXPORTS)}")
    store, out, made = (
        instance("store", store, Store, "Store.read", error=StoreError),
        path_of("out", out),
        EXPORTS[kind],
    )
    spreadsheet_safe = flag("spreadsheet_safe", spreadsheet_safe, error=StoreError)
    _check_apart(store.folder, out)
    _earlier(out, kind)
    shown = store.told(shown)
    if not shown.traced:
        found = "; ".join([f"only {shown.skipped} skipped", *shown.notes])
        raise StoreError(f"{store.folder} holds no traced facts, {found}: run it to its end first")
    with one_set(out, made.table, lambda folder: _earlier(folder, kind)) as scratch:
        facts, records = store.facts_and_records(shown)
        paths = made.write(records, scratch, facts)
        if shown.notes:
            paths.append(scratch / COVERAGE_FILE)
            paths[-1].write_text("".join(f"{note}\n" for note in shown.notes), encoding="utf-8")
        paths.append(_write_table(_safe(facts) if spreadsheet_safe else facts, scratch / made.table))
    return [out / path.relative_to(scratch) for path in paths]


def _check_apart(store: Path, out: Path) -> None:
    places = [store.resolve() / name for name in ("parts", "damaged")]
    where = out.resolve()
    if where == store.resolve() or any(place in (where, *where.parents) for place in places):
        raise StoreError(f"{out} is the run's own folder: give another one, such as {store / 'export'}")


def _write_rome(records: Iterable[Record], out: Path, facts: pd.DataFrame) -> list[Path]:
    numbers = _numbers(facts["id"])
    paths: list[Path] = []
    for record, result in _traced(records):
        case = {"known_id": numbers[record.fact.id], "correct_prediction": record.correct}
        paths += [result.save_rome_npz(out / "cases", stream, **case) for stream in _rome_streams(result)]
    facts.insert(0, "known_id", [numbers[name] for name in facts["id"]])
    return paths


def _traced(records: Iterable[Record]) -> Iterator[tuple[Record, TraceResult]]:
    for record in records:
        if record.result is not None:
            yield record, record.result


def _numbers(ids: Iterable[str]) -> dict[str, int]:
    names = list(ids)
    whole = {name: int(name) for name in names if re.fullmatch("[0-9]{1,18}", name)}
    if len(set(whole.values())) == len(names):
        return whole
    return {name: number for number, name in enumerate(names)}


def _rome_streams(result: TraceResult) -> list[str]:
    by_kind: dict[str, str] = {}
    for stream, kind in ROME_KINDS.items():
        if stream in result.streams:
            by_kind.setdefault(kind, stream)
    if not by_kind:
        raise StoreError(
            f"the store has {', '.join(result.streams)}, ROME has files for {', '.join(ROME_KINDS)}: "
            "export csv, or trace one of those"
        )
    return list(by_kind.values())


def _write_csv(records: Iterable[Record], out: Path, facts: pd.DataFrame) -> list[Path]:
    folders = _folders(facts["id"])
    paths: list[Path] = []
    for record, result in _traced(records):
        paths += result.to_csv(out / folders[record.fact.id])
    facts.insert(1, "folder", [folders[name] for name in facts["id"]])
    facts.loc[facts["status"] == "skipped", "folder"] = None
    return paths


def _folders(ids: Iterable[str]) -> dict[str, str]:
    """A folder per fact; no two are the same, even where capitals do not count."""
    return plain_names(ids, taken=("facts.csv", "cases.csv", COVERAGE_FILE))


def _write_table(frame: pd.DataFrame, path: Path) -> Path:
    # A text with \r and without quotes would end the row to most readers.
    broken = any(frame[name].astype(str).str.contains("\r", regex=False).any() for name in TEXT_COLUMNS)
    quoting = csv.QUOTE_NONNUMERIC if broken else csv.QUOTE_MINIMAL
    with atomic_write(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n", quoting=quoting)
    return path


def _safe(facts: pd.DataFrame) -> pd.DataFrame:
    """The table with an apostrophe before texts that would be formulas; numbers stay."""
    return facts.assign(**{name: facts[name].map(_no_formula) for name in (*TEXT_COLUMNS, "folder") if name in facts})


def _no_formula(cell: Any) -> Any:
    if isinstance(cell, str) and FORMULA.match(cell) and not NUMBER.fullmatch(cell):
        return f"'{cell}"
    return cell


# What an earlier export has left in a folder.


def _earlier(out: Path, kind: str) -> set[str]:
    """Names of the files of an earlier export of one format, by its table.

    Raises:
        StoreError: the table is no export's, or the folder has an export in another format.
    """
    names: set[str] = set()
    for each, made in EXPORTS.items():
        found = _names_in(out / made.table, made)
        if found and each != kind:
            raise StoreError(f"{out} holds an export in the format {each}: give another folder with --out, or empty it")
        names |= found
    return names


def _names_in(table: Path, made: "_Export") -> set[str]:
    try:
        content = read_regular(table)
    except FileNotFoundError:
        return set()
    try:
        rows = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
        expect({"id", "status", "clean_prob"} <= set(rows.columns), "columns of others")
        named = (name for row in rows.to_dict("records") for name in made.names(row))
        return {made.table, COVERAGE_FILE, *named}
    except NONSENSE as error:
        raise StoreError(
            f"{table} is not the table of an earlier export: give another folder with --out, or move it away"
        ) from error


def _rome_names(row: Mapping[Any, str]) -> list[str]:
    number = int(row["known_id"])
    return [f"cases/{rome_file_name(number, stream)}" for stream in ROME_KINDS]


def _csv_names(row: Mapping[Any, str]) -> list[str]:
    folder = row["folder"]
    expect(not folder or is_plain(folder), f"folder {folder!r}")
    return [f"{folder}/{site}.csv" for site in SITES] if folder else []


@dataclass(frozen=True)
class _Export:
    """A format.

    Attributes:
        table: file that lists the facts.
        write: writes the others into a folder, and completes the table.
        names: what a row of the table was written as.
    """

    table: str
    write: Callable[[Iterable[Record], Path, pd.DataFrame], list[Path]]
    names: Callable[[Mapping[Any, str]], list[str]]


EXPORTS: Mapping[str, _Export] = {
    "rome-npz": _Export("cases.csv", _write_rome, _rome_names),
    "csv": _Export("facts.csv", _write_csv, _csv_names),
}
"""Format -> what writes it."""
