"""Parts: some records as one parquet file, in a table that any tool can read.

A row is a fact. The columns:

    id, prompt, subject, target, foil, relation   the fact as it was given (string)
    status           "traced" or "skipped"
    reason           why it was skipped
    correct          whether the clean run's top token is the first of the expected answer (bool)
    tokens           the prompt's tokens as text (list of string)
    token_ids        their ids (list of int64)
    span_start       first token of the subject (int64)
    span_stop        the one after its last
    target_token     the token that was scored, as text
    target_id        its id (int64)
    clean_prob       p(target) of the clean run (double)
    corrupted_prob   p(target) of the corrupted run, averaged over samples
    corrupted_std    its standard deviation over samples
    n_layers         blocks of the model: rows of a grid (int64)
    n_positions      tokens of the prompt: columns of a grid
    prob_STREAM      the stream's grid: p(target) with that cell restored (list of n_layers * n_positions double,
                     layer by layer: the cell of layer l and position p is number l * n_positions + p, from 0)
    std_STREAM       its standard deviation over samples, in the same order
    METRIC_STREAM, METRIC_std_STREAM
                     the same in another metric (list of float: a store of all metrics stays within three times the
                     size of one of prob alone; results have these numbers as float too)
    details          the rest as JSON: streams (in order), top, cost, windows, metadata, target_ids, foil_ids, metrics
                     (of each the clean run's, the corrupted runs' mean and standard deviation, and whether there are
                     deviations of cells), subject_start (where the fact's source says so), and under "exact" those
                     texts that are not valid Unicode, which the columns show with "?"

A skipped fact has null from ``tokens`` on, ``details`` excepted. Every column is in every part of a run, so
``pandas.read_parquet("DIR/parts")`` and ``SELECT * FROM 'DIR/parts/*.parquet'`` read the whole run; a fact that two
processes traced at the same time is in two parts. The schema's metadata keeps the run's fingerprint.

A part is named ``part-RANK-NUMBER-TOKEN-SUM.parquet``: SUM is the start of its SHA-256, which finds any damage,
also where parquet's own checksums do not look.
"""

import dataclasses
import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fasttrace.errors import StoreError
from fasttrace.experiment.cells import SITES
from fasttrace.experiment.metrics import METRICS, SPREADLESS
from fasttrace.facts.dataset import Fact
from fasttrace.files.received import NONSENSE, expect, parsed, read_regular, why
from fasttrace.files.writing import SCHEMA_KEY, as_utf8
from fasttrace.planning.cost import Cost
from fasttrace.results.metric_grids import MetricGrids
from fasttrace.results.received import check_result, check_streams
from fasttrace.results.record import Record
from fasttrace.results.result import TraceResult
from fasttrace.runs.manifest import STORE_VERSION

__all__ = [
    "FACT_COLUMNS",
    "PLAIN_COLUMNS",
    "STATUSES",
    "DamagedPartError",
    "decode_record",
    "encode_part",
    "part_name",
    "read_part",
    "subject_starts",
]

FACT_COLUMNS = ("id", "prompt", "subject", "target", "foil", "relation")
PLAIN_COLUMNS = pa.schema(
    [
        *((name, pa.string()) for name in FACT_COLUMNS),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("correct", pa.bool_()),
        ("tokens", pa.list_(pa.string())),
        ("token_ids", pa.list_(pa.int64())),
        ("span_start", pa.int64()),
        ("span_stop", pa.int64()),
        ("target_token", pa.string()),
        ("target_id", pa.int64()),
        ("clean_prob", pa.float64()),
        ("corrupted_prob", pa.float64()),
        ("corrupted_std", pa.float64()),
        ("n_layers", pa.int64()),
        ("n_positions", pa.int64()),
    ]
)
STATUSES = ("traced", "skipped")
TEXTS = (*FACT_COLUMNS[1:], "reason", "tokens", "target_token")
"""Columns of which `details` may hold the exact text."""
SHORT_SUM = 16
NAME = re.compile(r"part-\d{3,}-\d{6,}-[0-9a-f]{8}-([0-9a-f]{16})\.parquet")


def _columns_of(metric: str) -> tuple[str, ...]:
    return (metric,) if metric in SPREADLESS else (metric, f"{metric}_std")


OF_METRICS = frozenset(f"{value}_{site}" for name in METRICS[1:] for value in _columns_of(name) for site in SITES)
"""Columns of the metrics that fasttrace knows, prob apart."""


class DamagedPartError(StoreError):
    """A part is not what was written, or gone."""


def part_name(content: bytes, rank: int, number: int) -> str:
    """Names a part so that no other has its name and that damage shows.

    Args:
        content: the part.
        rank: the process's rank.
        number: how many parts it wrote before.

    Returns:
        The file's name.
    """
    return f"part-{rank:03d}-{number:06d}-{secrets.token_hex(4)}-{_sum(content)}.parquet"


def encode_part(records: Sequence[Record], streams: Iterable[str], fingerprint: Mapping[str, Any]) -> bytes:
    """Turns records into the bytes of a part.

    Args:
        records: each traced or skipped.
        streams: those that have columns whether or not a record has them.
        fingerprint: the run's, plain JSON values.

    Returns:
        A parquet file.

    Raises:
        StoreError: a record is neither traced nor skipped, or its id cannot be written.
    """
    rows = [_row(record) for record in records]
    results = [record.result for record in records if record.result is not None]
    schema = _schema(
        dict.fromkeys([*streams, *(stream for result in results for stream in result.streams)]),
        dict.fromkeys([*METRICS[1:], *(metric for result in results for metric in result.others)]),
    )
    payload = json.dumps({"format_version": STORE_VERSION, "fingerprint": fingerprint}).encode()
    table = pa.Table.from_pylist(rows, schema.with_metadata({SCHEMA_KEY: payload}))
    sink = pa.BufferOutputStream()
    # Grids hardly repeat a number: a dictionary of them costs more than it saves.
    repeated: Any = ["relation", "status", "reason"]
    pq.write_table(table, sink, compression="zstd", use_dictionary=repeated, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def read_part(path: Path, columns: Sequence[str] | None = None) -> tuple[pa.Table, dict[str, Any]]:
    """Reads a part after checking every byte of it.

    Args:
        path: the part.
        columns: those to decode; None for all.

    Returns:
        The table, a row per fact, and the fingerprint of the run that wrote it.

    Raises:
        DamagedPartError: it is not what was written, or gone.
        StoreError: it may not be read, or a newer fasttrace wrote it.
    """
    content = _checked_bytes(path)
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        _check_columns(file.schema_arrow)
        table = file.read(columns, use_threads=False)
        _check_rows(table)
        payload = parsed((table.schema.metadata or {})[SCHEMA_KEY])
        version, fingerprint = payload["format_version"], payload["fingerprint"]
        expect(type(version) is int and version > 0, f"format version {version!r}: expected a whole number")
        expect(isinstance(fingerprint, dict), f"fingerprint {fingerprint!r}: expected an object")
    except MemoryError as error:
        raise StoreError(f"cannot read {path} (it does not fit in memory): free some memory, then try again") from error
    except (*NONSENSE, OSError) as error:
        raise DamagedPartError(f"{path} is no part of a store ({why(error)}): run again") from error
    if version > STORE_VERSION:
        raise StoreError(
            f"{path} has format version {version}, this fasttrace reads up to {STORE_VERSION}: upgrade fasttrace"
        )
    return table, fingerprint


def decode_record(table: pa.Table, row: int, where: object = "a part") -> Record:
    """Turns one row of a part into the record it was made from.

    Args:
        table: a part, with all its columns.
        row: number of the row.
        where: the part's path, for messages.

    Returns:
        A record equal to the one that was written.

    Raises:
        DamagedPartError: no fasttrace wrote such a row.
    """
    try:
        return _decoded(table, row)
    except NONSENSE as error:
        raise DamagedPartError(
            f"{where} holds what no run writes, in row {row} ({why(error)}): move it away and run again"
        ) from error


def _decoded(table: pa.Table, row: int) -> Record:
    cells = {name: table.column(name)[row].as_py() for name in PLAIN_COLUMNS.names}
    details = parsed(table.column("details")[row].as_py())
    for name, exact in details["exact"].items():
        expect(name in TEXTS and as_utf8(exact) == cells[name], f"another {name} in its details")
    cells |= details["exact"]
    for name in ("prompt", "subject", *(["reason"] if cells["status"] == "skipped" else [])):
        expect(isinstance(cells[name], str), f"no {name}")
    fact = Fact(**{name: cells[name] for name in FACT_COLUMNS}, subject_start=_start(details))
    if cells["status"] == "skipped":
        return Record(fact, None, cells["reason"], cells["correct"])
    check_streams(details["streams"])
    result = _result(cells, details, partial(_grids, table, row, streams=details["streams"]))
    check_result(result)
    expect(result.n_positions == cells["n_positions"], f"{cells['n_positions']} positions, {result.n_positions} tokens")
    return Record(fact, result, None, cells["correct"])


def subject_starts(table: pa.Table, where: object = "a part") -> dict[str, int]:
    """Gives the ids of facts whose source says where the subject begins, and the character at which it does.

    Args:
        table: columns id and details of a part.
        where: the part's path, for messages.

    Raises:
        DamagedPartError: no fasttrace wrote such a row.
    """
    rows = zip(table.column("id").to_pylist(), table.column("details").to_pylist(), strict=True)
    try:
        starts = {fact_id: _start(parsed(details)) for fact_id, details in rows if '"subject_start"' in details}
    except NONSENSE as error:
        raise DamagedPartError(
            f"{where} holds what no run writes ({why(error)}): move it away and run again"
        ) from error
    return {fact_id: start for fact_id, start in starts.items() if start is not None}


def _start(details: Mapping[str, Any]) -> int | None:
    start = details.get("subject_start")
    expect(start is None or (type(start) is int and start >= 0), f"subject_start {start!r}: expected a whole number")
    return start


def _check_columns(schema: pa.Schema) -> None:
    """Refuses a table that lacks columns of a part, or has them of other types; columns of others are left alone."""
    expect(len(set(schema.names)) == len(schema.names), "two columns of one name")
    for field in (*PLAIN_COLUMNS, pa.field("details", pa.string())):
        expect(field.name in schema.names, f"no column {field.name}")
        found = schema.field(field.name).type
        expect(found == field.type, f"column {field.name} of type {found}, expected {field.type}")
    for field in schema:
        if field.name in OF_METRICS:
            expect(field.type == pa.list_(pa.float32()), f"column {field.name} of type {field.type}")
        elif field.name.startswith(("prob_", "std_")):
            check_streams([field.name.partition("_")[2]])
            expect(field.type == pa.list_(pa.float64()), f"column {field.name} of type {field.type}")


def _check_rows(table: pa.Table) -> None:
    table.validate(full=True)
    if "id" in table.column_names:
        expect(table.column("id").null_count == 0, "a fact without an id")
    if "status" in table.column_names:
        found = set(table.column("status").unique().to_pylist())
        expect(found <= set(STATUSES), f"status {found}: expected {' or '.join(STATUSES)}")


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:SHORT_SUM]


def _checked_bytes(path: Path) -> bytes:
    named = NAME.fullmatch(path.name)
    if named is None:
        raise DamagedPartError(f"{path} does not have a part's name: leave parts as they are named")
    try:
        content = read_regular(path)
    except FileNotFoundError as error:
        raise DamagedPartError(f"{path} is gone: run again") from error
    if _sum(content) != named[1]:
        raise DamagedPartError(f"{path} is cut short or damaged (its checksum is {_sum(content)}): run again")
    return content


def _schema(streams: Iterable[str], metrics: Iterable[str]) -> pa.Schema:
    streams = list(streams)
    probs = [f"{value}_{stream}" for stream in streams for value in ("prob", "std")]
    others = [f"{value}_{stream}" for stream in streams for name in metrics for value in _columns_of(name)]
    grids = [pa.field(name, pa.list_(pa.float64())) for name in probs]
    grids += [pa.field(name, pa.list_(pa.float32())) for name in others]
    return pa.schema([*PLAIN_COLUMNS, *grids, pa.field("details", pa.string())])


def _row(record: Record) -> dict[str, Any]:
    _check(record)
    cells = {name: getattr(record.fact, name) for name in FACT_COLUMNS}
    cells |= {"status": "skipped" if record.result is None else "traced"}
    cells |= {"reason": record.reason, "correct": record.correct}
    details: dict[str, Any] = {}
    if record.result is not None:
        cells |= _cells(record.result)
        details = _details(record.result)
    texts = {name: as_utf8(value) for name, value in cells.items() if isinstance(value, str | list)}
    if record.fact.subject_start is not None:
        details["subject_start"] = record.fact.subject_start
    details["exact"] = {name: cells[name] for name, text in texts.items() if text != cells[name]}
    return cells | texts | {"details": json.dumps(details)}


def _check(record: Record) -> None:
    name = record.fact.id
    if (record.result is None) == (record.reason is None):
        found = "neither a result nor a reason" if record.result is None else "a result and a reason why it was skipped"
        raise StoreError(f"fact {name!r} has {found}: give one of the two")
    if as_utf8(name) != name:
        raise StoreError(f"fact id {name!r} is not valid Unicode, so no table can hold it: give it another id")


def _cells(result: TraceResult) -> dict[str, Any]:
    grids = {f"prob_{stream}": grid.ravel() for stream, grid in result.prob.items()}
    for metric, found in result.others.items():
        grids |= {f"{metric}_{stream}": grid.ravel() for stream, grid in found.mean.items()}
        grids |= {f"{metric}_std_{stream}": grid.ravel() for stream, grid in found.std.items()}
    return (
        grids
        | {f"std_{stream}": grid.ravel() for stream, grid in result.prob_std.items()}
        | {
            "tokens": list(result.tokens),
            "token_ids": result.token_ids,
            "span_start": result.span[0],
            "span_stop": result.span[1],
            "target_token": result.target,
            "target_id": result.target_id,
            "clean_prob": result.clean_prob,
            "corrupted_prob": result.corrupted_prob,
            "corrupted_std": result.corrupted_std,
            "n_layers": result.n_layers,
            "n_positions": result.n_positions,
        }
    )


def _details(result: TraceResult) -> dict[str, Any]:
    kept = {name: getattr(result, name) for name in ("streams", "top", "windows", "metadata", "target_ids", "foil_ids")}
    metrics = {name: [*found[2:], bool(found.std)] for name, found in result.others.items()}
    return kept | {"cost": dataclasses.asdict(result.cost), "metrics": metrics}


def _grids(table: pa.Table, row: int, value: str, streams: Iterable[str]) -> dict[str, np.ndarray]:
    n_layers = table.column("n_layers")[row].as_py()
    lists = {stream: table.column(f"{value}_{stream}")[row] for stream in streams}
    for grid in lists.values():
        expect(pa.types.is_floating(grid.type.value_type), f"a grid of type {grid.type}")
    return {stream: grid.values.to_numpy().reshape(n_layers, -1) for stream, grid in lists.items()}


def _others(details: Mapping[str, Any], grids: Callable[[str], Mapping[str, np.ndarray]]) -> dict[str, MetricGrids]:
    """Of a part of an earlier format none."""
    return {
        name: MetricGrids(grids(name), grids(f"{name}_std") if has_std else {}, *numbers)
        for name, (*numbers, has_std) in details.get("metrics", {}).items()
    }


def _result(
    cells: Mapping[str, Any], details: Mapping[str, Any], grids: Callable[[str], Mapping[str, np.ndarray]]
) -> TraceResult:
    kept = ("clean_prob", "corrupted_prob", "corrupted_std", "tokens", "token_ids", "target_id")
    return TraceResult(
        prob=grids("prob"),
        prob_std=grids("std"),
        span=(cells["span_start"], cells["span_stop"]),
        target=cells["target_token"],
        top=details["top"],
        windows=details["windows"],
        cost=Cost(**details["cost"]),
        metadata=details["metadata"],
        target_ids=details.get("target_ids", ()),
        foil_ids=details.get("foil_ids", ()),
        others=_others(details, grids),
        **{name: cells[name] for name in kept},
    )
