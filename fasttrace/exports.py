"""Exports: a store's facts as the files of other programs.

``rome-npz`` writes what ROME's ``causal_trace.py`` writes, one file per fact and stream that ROME knows:

    OUT/cases/knowledge_12.npz  OUT/cases/knowledge_12_mlp.npz  OUT/cases/knowledge_12_attn.npz
    OUT/cases.csv               which number is which fact

A fact's number is its id when every id in the store is a whole number, as in ROME's own facts; otherwise facts are
numbered from 0 in the store's order. When both `mlp_activation` and `mlp_output` were traced, which ROME gives one
name, the first is written.

``csv`` writes the tutorial's CSVs, with columns ``layer,pos,prob``, one folder per fact:

    OUT/12/block_output.csv ...
    OUT/facts.csv               every fact, its folder, probabilities, or why it was skipped

A folder has the fact's id as its name, with characters that are not safe in file names written as ``%2F``.
"""

import hashlib
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from fasttrace.errors import StoreError
from fasttrace.files import atomic_write
from fasttrace.results import TraceResult
from fasttrace.rome import ROME_KINDS
from fasttrace.stores import Record, Store

__all__ = ["EXPORTS", "export"]

SAFE_LENGTH = 100


def export(store: Store, out: str | os.PathLike[str], kind: str) -> list[Path]:
    """Writes a store's facts as files of another program; files of the same name are replaced.

    Args:
        store: what to write; it may be unfinished.
        out: the folder, made when missing.
        kind: one of `EXPORTS`: "rome-npz" or "csv".

    Returns:
        The paths written, those that list the facts last.

    Raises:
        StoreError: unknown kind, no traced facts, no stream that ROME knows, or a file cannot be written.
    """
    if kind not in EXPORTS:
        raise StoreError(f"unknown format {kind!r}: choose from {', '.join(EXPORTS)}")
    facts = store.facts()
    if "traced" not in set(facts["status"]):
        raise StoreError(f"{store.folder} holds no traced facts, only {len(facts)} skipped: run it to its end first")
    return EXPORTS[kind](store, Path(out), facts)


def _export_rome(store: Store, out: Path, facts: pd.DataFrame) -> list[Path]:
    numbers = _numbers(facts["id"])
    paths: list[Path] = []
    for record, result in _traced(store, numbers):
        case = {"known_id": numbers[record.fact.id], "correct_prediction": record.correct}
        paths += [result.save_rome_npz(out / "cases", stream, **case) for stream in _rome_streams(result)]
    facts.insert(0, "known_id", [numbers[name] for name in facts["id"]])
    return [*paths, _write_table(facts, out / "cases.csv")]


def _traced(store: Store, known: Container[str]) -> Iterator[tuple[Record, TraceResult]]:
    for record in store.records():
        # The run may still go on: what it adds meanwhile is not in the list of facts.
        if record.result is not None and record.fact.id in known:
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


def _export_csv(store: Store, out: Path, facts: pd.DataFrame) -> list[Path]:
    folders = _folders(facts["id"])
    paths: list[Path] = []
    for record, result in _traced(store, folders):
        paths += result.to_csv(out / folders[record.fact.id])
    facts.insert(1, "folder", [folders[name] for name in facts["id"]])
    facts.loc[facts["status"] == "skipped", "folder"] = None
    return [*paths, _write_table(facts, out / "facts.csv")]


def _folders(ids: Iterable[str]) -> dict[str, str]:
    """A folder per fact; no two are the same, even where capitals do not count."""
    folders: dict[str, str] = {}
    taken: set[str] = {"facts.csv"}
    for fact_id in ids:
        name = _safe(fact_id)
        if name.casefold() in taken:
            name = _with_sum(name, fact_id)
        taken.add(name.casefold())
        folders[fact_id] = name
    return folders


def _safe(fact_id: str) -> str:
    name = quote(fact_id, safe=" ")
    name = re.sub(r"^[. ]|[. ]$", lambda end: f"%{ord(end[0]):02X}", name)
    return name if 0 < len(name) <= SAFE_LENGTH else _with_sum(name, fact_id)


def _with_sum(name: str, fact_id: str) -> str:
    return f"{name[:SAFE_LENGTH]}-{hashlib.sha256(fact_id.encode()).hexdigest()[:12]}"


def _write_table(frame: pd.DataFrame, path: Path) -> Path:
    with atomic_write(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n")
    return path


EXPORTS: Mapping[str, Callable[[Store, Path, pd.DataFrame], list[Path]]] = {
    "rome-npz": _export_rome,
    "csv": _export_csv,
}
"""Format -> what writes it."""
