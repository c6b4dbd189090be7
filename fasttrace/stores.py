"""Stores: a folder that a run writes its facts into, part by part, and that survives being killed.

    DIR/manifest.json    the run's fingerprint and what it was asked for (see `fasttrace.manifest`)
    DIR/parts/           parquet files, a row per fact (see `fasttrace.parts`)
    DIR/damaged/         parts that were cut short or changed, set aside

A part appears whole or not at all and is never changed, so nothing has to be locked: any number of processes may
write into one folder, and whatever kills them, the parts that are there are complete. A fact is done when a valid
part holds it.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from fasttrace.datasets import Fact
from fasttrace.errors import StoreError
from fasttrace.files import TEMPORARY, as_utf8, atomic_write, remove_stale, set_aside
from fasttrace.manifest import (
    GO_ON,
    NOTED,
    VERSIONS,
    check_fingerprint,
    differences,
    join_manifest,
    plain_json,
    read_manifest,
    write_manifest,
)
from fasttrace.parts import (
    PLAIN_COLUMNS,
    DamagedPartError,
    Record,
    decode_record,
    encode_part,
    part_name,
    read_part,
)
from fasttrace.results import VALUES

__all__ = ["Record", "Store"]

MANIFEST, PARTS, DAMAGED = "manifest.json", "parts", "damaged"
OPEN_PARTS = 16
"""How many parts `records` keeps in memory: as many as ranks that took turns."""
SCORED = ("prompt", "subject", "target")
"""What of a fact its numbers depend on."""
FRAME_COLUMNS = ("fact", "stream", "layer", "position", "token", "in_subject", *VALUES)


class Store:
    """A run's folder; made by `Store.open` to write, or `Store.read` to read.

    Attributes:
        folder: where it is.
        fingerprint: of the run, from the manifest.
        notes: what is different here and does not matter enough to refuse: names, versions of packages.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], here: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.fingerprint: dict[str, Any] = manifest["fingerprint"]
        self._facts: dict[str, Any] = manifest["facts"]
        self._here = here
        self.notes = () if here is None else _notes(self.fingerprint, here)
        self._ids: dict[str, tuple[str, ...]] = {}
        self._written = 0

    def __repr__(self) -> str:
        return f"Store({str(self.folder)!r})"

    @classmethod
    def open(cls, folder: str | os.PathLike[str], fingerprint: Mapping[str, Any]) -> "Store":
        """Makes a store, or goes on with the one that is there.

        Every part is read; those that are damaged are set aside, so that their facts are to be done again.

        Args:
            folder: made when missing.
            fingerprint: JSON values: all that changes the run's numbers. What differs in names and under "versions" is
                noted (`fasttrace.manifest.NOTED`); a "sigma" may differ by one part in a million and "streams" in their
                order; anything else has to be equal.

        Returns:
            The store, ready to write.

        Raises:
            StoreError: another run's store (it lists what differs), one of a newer format, an edited
                manifest, or a folder that cannot be written to.
        """
        folder, here = Path(folder), plain_json(fingerprint)
        if not os.path.exists(folder / MANIFEST):
            # Parts that have lost their manifest may be another run's: ask them before a new one is written.
            cls(folder, {"fingerprint": here, "facts": {}})._scan()
        store = cls(folder, join_manifest(folder / MANIFEST, here), here)
        store._make_writable()
        store.check()
        return store

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "Store":
        """Opens a store for reading only; nothing in it is changed.

        Args:
            folder: an existing store.

        Returns:
            The store; `damaged` lists the parts that it leaves out.

        Raises:
            StoreError: no store, one of a newer format, or an edited manifest.
        """
        return cls(Path(folder), read_manifest(Path(folder) / MANIFEST))

    @property
    def description(self) -> dict[str, Any]:
        """What `describe` was told: name, n_facts, bad_rows; empty before."""
        return dict(self._facts)

    @property
    def done(self) -> frozenset[str]:
        """Ids of the facts, traced or skipped, in valid parts; those that other processes wrote meanwhile included."""
        self._scan()
        return frozenset(fact_id for ids in self._ids.values() for fact_id in ids)

    @property
    def damaged(self) -> tuple[Path, ...]:
        """Parts in the folder that are not what was written; empty after `check`."""
        return tuple(self._scan())

    def describe(self, name: str, n_facts: int, bad_rows: Sequence[Any] = ()) -> None:
        """Writes into the manifest what the run was asked for; it is not compared when a run goes on.

        Args:
            name: of the set of facts.
            n_facts: how many there are to trace.
            bad_rows: rows that could not be read as facts: JSON values.

        Raises:
            StoreError: the store is open for reading only, or cannot be written to.
        """
        self._check_open()
        manifest = read_manifest(self.folder / MANIFEST)
        self._facts = plain_json({"name": name, "n_facts": n_facts, "bad_rows": list(bad_rows)})
        if manifest["facts"] != self._facts:
            write_manifest(self.folder / MANIFEST, {**manifest, "facts": self._facts})

    def remaining(self, facts: Sequence[Fact]) -> list[Fact]:
        """Gives the facts that are still to be done.

        Args:
            facts: all that were asked for.

        Returns:
            Those whose id is in no valid part, in the given order.

        Raises:
            StoreError: the store has another fact under the same id.
        """
        frame = self.facts().set_index("id")[list(SCORED)].astype(object)
        texts = frame.where(frame.notna(), None)
        there = {fact_id: dict(zip(SCORED, row, strict=True)) for fact_id, *row in texts.itertuples()}
        for fact in facts:
            if fact.id in there:
                _check_same_fact(fact, there[fact.id])
        return [fact for fact in facts if fact.id not in there]

    def write(self, records: Sequence[Record], *, rank: int = 0) -> Path:
        """Writes records as one part, whole or not at all; no file is ever replaced.

        Args:
            records: one or more, each traced or skipped.
            rank: number of the process, for the part's name.

        Returns:
            The part.

        Raises:
            StoreError: no records, one that is neither traced nor skipped, a store that is open for reading
                only, or a part that cannot be written, as on a full disk: what was written before stays,
                and the same run goes on from there.
        """
        self._check_open()
        if not records:
            raise StoreError("no records to write: give one or more")
        content = encode_part(records, self._columns(), self._here or {})
        path = self.folder / PARTS / part_name(content, rank, self._written)
        with atomic_write(path, GO_ON) as temporary:
            temporary.write_bytes(content)
        self._written += 1
        self._ids[path.name] = tuple(record.fact.id for record in records)
        return path

    def check(self) -> tuple[Path, ...]:
        """Reads every part again and moves those that are damaged into ``DIR/damaged``.

        Returns:
            Where they are now; their facts are no longer done.

        Raises:
            StoreError: the store is open for reading only, a part is another run's or of a newer format, or a
                damaged part cannot be moved.
        """
        self._check_open()
        self._ids.clear()
        moved = [set_aside(path, self.folder / DAMAGED) for path in self.damaged]
        return tuple(path for path in moved if path is not None)

    def records(self) -> Iterator[Record]:
        """Gives every fact once, by id: numbers in ids count as numbers, so "9" comes before "10".

        Of a fact that two parts hold, the part whose name comes first counts.

        Yields:
            Records equal to those that were written.

        Raises:
            StoreError: a part was damaged or removed since the store was opened.
        """
        table = lru_cache(OPEN_PARTS)(lambda name: read_part(self.folder / PARTS / name)[0])
        for name, row in self._places().values():
            yield decode_record(table(name), row)

    def facts(self) -> pd.DataFrame:
        """Gives a row per fact, in the order of `records`, without decoding a grid.

        Returns:
            Columns id, prompt, subject, target, foil, relation, status ("traced" or "skipped"), reason, correct,
            span_start, span_stop, target_token, target_id, clean_prob, corrupted_prob, corrupted_std, n_layers,
            n_positions (as `fasttrace.parts` describes them) and total_effect. Of a skipped fact those from
            span_start on are missing.

        Raises:
            StoreError: a part was damaged or removed since the store was opened.
        """
        places = self._places()
        schema = pa.schema([field for field in PLAIN_COLUMNS if not pa.types.is_list(field.type)])
        names = sorted({name for name, _ in places.values()})
        tables = [read_part(self.folder / PARTS / name, schema.names)[0] for name in names]
        rows = pa.concat_tables([schema.empty_table(), *(table.replace_schema_metadata() for table in tables)])
        nullable = {pa.bool_(): pd.BooleanDtype(), pa.int64(): pd.Int64Dtype()}
        frame = rows.to_pandas(types_mapper=nullable.get).drop_duplicates("id").set_index("id")
        frame["total_effect"] = frame["clean_prob"] - frame["corrupted_prob"]
        return frame.loc[list(places)].reset_index()

    def frame(self) -> pd.DataFrame:
        """Gives all grids of all facts as one tidy frame, a row per cell.

        Returns:
            Column fact, the id, and those of `TraceResult.to_frame`; facts in the order of `records`.

        Raises:
            StoreError: a part was damaged or removed since the store was opened.
        """
        frames = []
        for record in self.records():
            if record.result is not None:
                cells = record.result.to_frame()
                cells.insert(0, "fact", record.fact.id)
                frames.append(cells)
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(FRAME_COLUMNS))

    def _check_open(self) -> None:
        if self._here is None:
            raise StoreError(f"{self.folder} is open for reading only: open it with Store.open to write")

    def _make_writable(self) -> None:
        parts = self.folder / PARTS
        try:
            parts.mkdir(exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot write to {self.folder} ({error}): give another folder") from error
        for folder in (self.folder, parts):
            if not os.access(folder, os.W_OK | os.X_OK):
                raise StoreError(f"{folder} cannot be written to: give another folder, or make it writable")
            remove_stale(folder)

    def _columns(self) -> list[str]:
        # So that all parts have the same columns, those with nothing but skipped facts too.
        streams = self.fingerprint.get("streams", ())
        return [stream for stream in streams if isinstance(stream, str)]

    def _paths(self) -> list[Path]:
        try:
            paths = sorted((self.folder / PARTS).iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"cannot list {self.folder / PARTS} ({error}): give a folder you may read") from error
        return [path for path in paths if path.suffix == ".parquet" and not path.name.startswith(TEMPORARY)]

    def _scan(self) -> list[Path]:
        """Looks at the parts that were not looked at before, or were damaged; gives those that are."""
        # One listing: a part that another process adds meanwhile is not looked at, so it is not damaged either.
        damaged = []
        for path in self._paths():
            if path.name not in self._ids:
                try:
                    self._ids[path.name] = self._ids_in(path)
                except DamagedPartError:
                    damaged.append(path)
        return damaged

    def _ids_in(self, path: Path) -> tuple[str, ...]:
        table, fingerprint = read_part(path, ["id"])
        check_fingerprint(fingerprint, self.fingerprint, str(path))
        return tuple(table.column("id").to_pylist())

    def _places(self) -> dict[str, tuple[str, int]]:
        """Where each fact is: id -> part and row, in the order in which facts are given."""
        self._scan()
        places: dict[str, tuple[str, int]] = {}
        for name in sorted(self._ids):
            for row, fact_id in enumerate(self._ids[name]):
                places.setdefault(fact_id, (name, row))
        return {fact_id: places[fact_id] for fact_id in sorted(places, key=_by_number)}


def _notes(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[str, ...]:
    left, right = (
        {**(side.get(VERSIONS) or {}), **{key: side.get(key) for key in NOTED if key != VERSIONS}}
        for side in (there, here)
    )
    return tuple(differences(left, right))


def _by_number(fact_id: str) -> tuple[list[tuple[int, str]], str]:
    # Text and digits alternate; of two numbers the one with more digits is the larger.
    pieces = re.split("([0-9]+)", fact_id)
    numbers = [piece.lstrip("0") if odd % 2 else piece for odd, piece in enumerate(pieces)]
    return [(len(piece) if odd % 2 else 0, piece) for odd, piece in enumerate(numbers)], fact_id


def _check_same_fact(fact: Fact, there: Mapping[Any, Any]) -> None:
    found = differences(there, {name: as_utf8(getattr(fact, name)) for name in SCORED})
    if found:
        raise StoreError(
            f"the store has another fact {fact.id!r} ({'; '.join(found)}): give another folder for another set of facts"
        )
