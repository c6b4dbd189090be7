"""Stores: a folder that a run writes its facts into, part by part, and that survives being killed.

    DIR/manifest.json    the run's fingerprint and what it was asked for (see `fasttrace.runs.manifest`)
    DIR/parts/           parquet files, a row per fact (see `fasttrace.runs.parts`)
    DIR/damaged/         parts that were cut short or changed, set aside

A part appears whole or not at all and is never changed, so nothing has to be locked: any number of processes may
write into one folder, and whatever kills them, the parts that are there are complete. A fact is done when a valid
part holds it.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from fasttrace.checks import flag, instance, mapping, objects, path_of, whole_number
from fasttrace.errors import StoreError
from fasttrace.experiment.cells import SITES
from fasttrace.facts.dataset import Fact
from fasttrace.files.object_stores import copied, is_address
from fasttrace.files.received import patiently
from fasttrace.files.writing import TEMPORARY, as_utf8, atomic_write, plain_json, remove_stale, set_aside
from fasttrace.results.record import Record
from fasttrace.results.result import VALUES
from fasttrace.runs.coverage import Coverage
from fasttrace.runs.manifest import (
    GO_ON,
    NOTED,
    VERSIONS,
    check_fingerprint,
    differences,
    join_manifest,
    read_manifest,
    write_manifest,
)
from fasttrace.runs.parts import (
    PLAIN_COLUMNS,
    DamagedPartError,
    decode_record,
    encode_part,
    part_name,
    read_part,
    subject_starts,
)
from fasttrace.runs.shelf import Shelf

__all__ = ["Store"]

MANIFEST, PARTS, DAMAGED = "manifest.json", "parts", "damaged"
SCORED = ("prompt", "subject", "target")
"""What of a fact its numbers depend on."""
COMPARED = ("id", *SCORED, "details")
"""Columns that say whether a fact is the one that is asked for: the last one where its subject begins."""
TABLE_SCHEMA = pa.schema([field for field in PLAIN_COLUMNS if not pa.types.is_list(field.type)])
"""Columns of `Store.facts`, but for the total effect."""
FRAME_COLUMNS = ("fact", "stream", "layer", "position", "token", "in_subject", *VALUES)

logger = logging.getLogger("fasttrace")


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
        self._skipped: dict[str, frozenset[str]] = {}
        self._written = 0
        self._copy: Any = None
        self._read: dict[str, pa.Table] | None = None
        """What is to be compared of parts that `open` reads, by their names, until `remaining` has compared it."""

    def __repr__(self) -> str:
        return f"Store({str(self.folder)!r})"

    @classmethod
    def open(cls, folder: str | os.PathLike[str], fingerprint: Mapping[str, Any]) -> "Store":
        """Makes a store, or goes on with the one that is there.

        Every part is read; those that are damaged are set aside, so that their facts are to be done again.

        Args:
            folder: made when missing.
            fingerprint: JSON values: all that changes the run's numbers. What differs in names and under "versions" is
                noted (`runs.manifest.NOTED`); a "sigma" may differ by one part in a million and "streams" in their
                order; anything else has to be equal.

        Returns:
            The store, ready to write.

        Raises:
            StoreError: another run's store (it lists what differs), one of a newer format, an edited
                manifest, or a folder that cannot be written to.
        """
        folder = path_of("folder", folder)
        here = plain_json(mapping("fingerprint", fingerprint, error=StoreError), "fingerprint")
        if not os.path.exists(folder / MANIFEST):
            # Parts that have lost their manifest may be another run's: ask them before a new one is written.
            cls(folder, {"fingerprint": here, "facts": {}})._scan()
        store = cls(folder, join_manifest(folder / MANIFEST, here), here)
        store._read = {}
        store._make_writable()
        store.check()
        return store

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "Store":
        """Opens a store for reading only; nothing in it is changed.

        Args:
            folder: an existing store; or its address in an object store, such as s3://bucket/run, of which a copy is
                made that goes with the object.

        Returns:
            The store; `damaged` lists the parts that it leaves out.

        Raises:
            StoreError: no store, one of a newer format, an edited manifest, or an address that cannot be read.
        """
        copy = copied(folder, MANIFEST, PARTS, ".parquet") if is_address(folder) else None
        folder = path_of("folder", folder if copy is None else copy.name)
        store = cls(folder, read_manifest(folder / MANIFEST))
        store._copy = copy
        return store

    @property
    def description(self) -> dict[str, Any]:
        """What `describe` was told: name, n_facts, bad_rows; empty before. The ids are not repeated here."""
        return {name: value for name, value in self._facts.items() if name != "ids"}

    @property
    def done(self) -> frozenset[str]:
        """Ids of the facts, traced or skipped, in valid parts; those that other processes wrote meanwhile included."""
        self._scan()
        return frozenset(fact_id for ids in self._ids.values() for fact_id in ids)

    @property
    def damaged(self) -> tuple[Path, ...]:
        """Parts in the folder that are not what was written; empty after `check`."""
        return tuple(self._scan())

    def describe(self, name: str, n_facts: int, bad_rows: Sequence[Any] = (), ids: Sequence[str] | None = None) -> None:
        """Writes into the manifest what the run was asked for; it is not compared when a run goes on.

        Args:
            name: of the set of facts.
            n_facts: how many there are to trace.
            bad_rows: rows that could not be read as facts: JSON values.
            ids: of the facts; what is shown of the run goes over these. None: over all that are in the folder.

        Raises:
            StoreError: the store is open for reading only, or cannot be written to.
        """
        self._check_open()
        manifest = read_manifest(self.folder / MANIFEST)
        asked = {} if ids is None else {"ids": list(ids)}
        about = {"name": name, "n_facts": n_facts, "bad_rows": list(bad_rows), **asked}
        self._facts = plain_json(about, "description of the facts")
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
        facts = list(objects("facts", facts, Fact, "read_facts", error=StoreError))
        there = self._there(any(fact.subject_start is not None for fact in facts))
        for fact in facts:
            if fact.id in there:
                _check_same_fact(fact, *there[fact.id])
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
        rank = whole_number("rank", rank, 0, error=StoreError)
        records = list(objects("records", records, Record, "Tracer.trace_many", error=StoreError))
        if not records:
            raise StoreError("no records to write: give one or more")
        content = encode_part(records, self._columns(), self._here or {})
        path = self.folder / PARTS / part_name(content, rank, self._written)
        with atomic_write(path, GO_ON) as temporary:
            temporary.write_bytes(content)
        self._written += 1
        self._keep(path.name, [record.fact.id for record in records], [record.result is None for record in records])
        return path

    @property
    def seen(self) -> dict[str, tuple[str, ...]]:
        """Parts that were looked at, or that a process told of, and the ids in each; nothing is listed for it."""
        return dict(self._ids)

    def statuses(self) -> dict[str, str]:
        """Of each fact in the parts that were looked at, "traced" or "skipped"; no part is read twice for it."""
        self._scan()
        return {
            fact_id: "skipped" if fact_id in self._skipped[name] else "traced"
            for fact_id, (name, _) in self._places().items()
        }

    def learn(self, parts: Mapping[str, Mapping[str, bool]]) -> None:
        """Takes the word of other processes for parts that they wrote, which a listing may not show yet.

        Args:
            parts: names of parts, and of each the ids in it with whether that fact was skipped.
        """
        for name, facts in parts.items():
            self._keep(name, list(facts), list(facts.values()))

    def look(self, name: str) -> bool:
        """Looks at one part without listing the folder.

        Args:
            name: that a part may have.

        Returns:
            Whether there is such a part, whole; its facts are done then.

        Raises:
            StoreError: it is another run's, of a newer format, or may not be read.
        """
        if os.path.basename(name) != name:
            return False
        with suppress(DamagedPartError):
            if name not in self._ids:
                self._look_into(self.folder / PARTS / name)
            return True
        return False

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

    def coverage(self, everything: bool = False) -> Coverage:
        """Compares what is in the folder now with what the run was last asked for.

        Args:
            everything: show also facts that are in the folder and were not asked for.

        Returns:
            The counts, and the facts to show. `records`, `facts`, `frame`, and the exports take it, so that all of
            them show the same facts while others still write.

        Raises:
            StoreError: a file cannot be read, or is another run's.
        """
        everything = flag("everything", everything, error=StoreError)
        damaged = tuple(self._scan().values())
        places = self._places()
        named = self._facts.get("ids")
        wanted = places.keys() if named is None else set(named)
        there = sum(fact_id in wanted for fact_id in places)
        asked = self._facts.get("n_facts")
        ids = tuple(fact_id for fact_id in places if everything or fact_id in wanted)
        skipped = sum(fact_id in self._skipped[places[fact_id][0]] for fact_id in ids)
        return Coverage(
            asked=asked,
            traced=len(ids) - skipped,
            skipped=skipped,
            missing=0 if asked is None else max(0, asked - there),
            damaged=damaged,
            further=len(places) - (there if named is not None else min(there, asked or there)),
            everything=everything or named is None,
            ids=ids,
        )

    def records(self, shown: Coverage | None = None) -> Iterator[Record]:
        """Gives every fact once, by id: numbers in ids count as numbers, so "9" comes before "10".

        Of a fact that two parts hold, the part whose name comes first counts. Each part is read once.

        Args:
            shown: which facts, from `coverage`. None: those that the run was asked for; a warning says so when
                some are missing, and when others are in the folder.

        Yields:
            Records equal to those that were written.

        Raises:
            StoreError: a part was damaged or removed since the store was opened, or holds what no run writes.
        """
        shown = self.told(shown)
        places = self._placed(shown)
        shelf = self._shelf(places)
        for name, row in places.values():
            yield decode_record(shelf.table(name), row, self.folder / PARTS / name)

    def facts(self, shown: Coverage | None = None) -> pd.DataFrame:
        """Gives a row per fact, in the order of `records`, without decoding a grid.

        Args:
            shown: which facts, see `records`.

        Returns:
            Columns id, prompt, subject, target, foil, relation, status ("traced" or "skipped"), reason, correct,
            span_start, span_stop, target_token, target_id, clean_prob, corrupted_prob, corrupted_std, n_layers,
            n_positions (as `fasttrace.runs.parts` describes them) and total_effect. Of a skipped fact those from
            span_start on are missing.

        Raises:
            StoreError: a part was damaged or removed since the store was opened.
        """
        places = self._placed(self.told(shown))
        names = sorted({name for name, _ in places.values()})
        columns = [field.name for field in TABLE_SCHEMA]
        return _facts_frame([read_part(self.folder / PARTS / name, columns)[0] for name in names], list(places))

    def facts_and_records(self, shown: Coverage) -> tuple[pd.DataFrame, Iterator[Record]]:
        """Gives what `facts` and `records` give, at the cost of reading each part once for both.

        Raises:
            StoreError: as for `records`.
        """
        places = self._placed(shown)
        shelf = self._shelf(places)
        columns = [field.name for field in TABLE_SCHEMA]
        tables = (shelf.table(name).select(columns) for name in sorted({name for name, _ in places.values()}))
        records = (decode_record(shelf.table(name), row, self.folder / PARTS / name) for name, row in places.values())
        return _facts_frame(tables, list(places)), records

    def _there(self, with_starts: bool) -> dict[str, tuple[dict[str, Any], int | None]]:
        """Of each fact in the folder, by id: its texts, and where its subject begins if its source says so."""
        self._scan()
        read, self._read = self._read or {}, None
        there: dict[str, tuple[dict[str, Any], int | None]] = {}
        for name in sorted(self._ids):
            path = self.folder / PARTS / name
            table = read.pop(name) if name in read else read_part(path, COMPARED)[0]
            starts = subject_starts(table, path) if with_starts else {}
            for fact_id, *texts in zip(*(table.column(column).to_pylist() for column in COMPARED[:-1]), strict=True):
                there.setdefault(fact_id, (dict(zip(SCORED, texts, strict=True)), starts.get(fact_id)))
        return there

    def frame(self, shown: Coverage | None = None) -> pd.DataFrame:
        """Gives all grids of all facts as one tidy frame, a row per cell.

        Args:
            shown: which facts, see `records`.

        Returns:
            Column fact, the id, and those of `TraceResult.to_frame`; facts in the order of `records`.

        Raises:
            StoreError: a part was damaged or removed since the store was opened.
        """
        frames = []
        for record in self.records(shown):
            if record.result is not None:
                cells = record.result.to_frame()
                cells.insert(0, "fact", record.fact.id)
                frames.append(cells)
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(FRAME_COLUMNS))

    def told(self, shown: Coverage | None) -> Coverage:
        """The facts to show; a caller who did not choose them is told, by a warning, what is missing or left out."""
        if shown is not None:
            return instance("shown", shown, Coverage, "Store.coverage", error=StoreError)
        shown = self.coverage()
        for note in shown.notes:
            logger.warning("%s: %s", self.folder, note)
        return shown

    def _placed(self, shown: Coverage) -> dict[str, tuple[str, int]]:
        """Where each fact to show is; see `_places`."""
        places = self._places()
        gone = [fact_id for fact_id in shown.ids if fact_id not in places]
        if gone:
            raise StoreError(f"fact {gone[0]!r} is no longer in {self.folder}: its part was set aside; run again")
        return {fact_id: places[fact_id] for fact_id in shown.ids}

    def _shelf(self, places: Mapping[str, tuple[str, int]]) -> Shelf:
        return Shelf([self.folder / PARTS / name for name in sorted({name for name, _ in places.values()})])

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
        streams = self.fingerprint.get("streams")
        return [stream for stream in streams if stream in SITES] if isinstance(streams, list) else []

    def _paths(self) -> list[Path]:
        try:
            paths = patiently(lambda: sorted((self.folder / PARTS).iterdir()))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"cannot list {self.folder / PARTS} ({error}): give a folder you may read") from error
        return [path for path in paths if path.suffix == ".parquet" and not path.name.startswith(TEMPORARY)]

    def _scan(self) -> dict[Path, str]:
        """Looks at the parts that were not looked at before, or were damaged; gives those that are, and why."""
        # One listing: a part that another process adds meanwhile is not looked at, so it is not damaged either.
        damaged = {}
        for path in self._paths():
            if path.name not in self._ids:
                try:
                    self._look_into(path)
                except DamagedPartError as error:
                    if os.path.lexists(path):  # or else another process has set it aside
                        damaged[path] = str(error).replace(str(path), path.name)
        return damaged

    def _look_into(self, path: Path) -> None:
        table, fingerprint = read_part(path, ["status", *(COMPARED if self._read is not None else ("id",))])
        check_fingerprint(fingerprint, self.fingerprint, str(path))
        if self._read is not None:
            self._read[path.name] = _compared(table)
        skipped = [status == "skipped" for status in table.column("status").to_pylist()]
        self._keep(path.name, table.column("id").to_pylist(), skipped)

    def _keep(self, name: str, ids: Sequence[str], skipped: Sequence[bool]) -> None:
        # Of a fact that is twice in one part, the first row counts.
        first = dict(reversed(list(zip(ids, skipped, strict=True))))
        self._skipped[name] = frozenset(fact_id for fact_id, was_skipped in first.items() if was_skipped)
        self._ids[name] = tuple(ids)

    def _places(self) -> dict[str, tuple[str, int]]:
        """Where each fact is that was found: id -> part and row, in the order in which facts are given."""
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


def _compared(table: pa.Table) -> pa.Table:
    """A part's columns to compare, without details that say nothing of it: those of all facts would fill the memory."""
    details = (text if text is None or '"subject_start"' in text else "{}" for text in table["details"].to_pylist())
    return table.select(COMPARED[:-1]).append_column("details", pa.array(details, pa.string()))


def _facts_frame(tables: Iterable[pa.Table], ids: list[str]) -> pd.DataFrame:
    """The rows of some facts, in their order, from tables that hold them."""
    rows = pa.concat_tables([TABLE_SCHEMA.empty_table(), *(table.replace_schema_metadata() for table in tables)])
    nullable = {pa.bool_(): pd.BooleanDtype(), pa.int64(): pd.Int64Dtype()}
    frame = rows.to_pandas(types_mapper=nullable.get).drop_duplicates("id").set_index("id")
    frame["total_effect"] = frame["clean_prob"] - frame["corrupted_prob"]
    return frame.loc[ids].reset_index()


def _by_number(fact_id: str) -> tuple[list[tuple[int, str]], str]:
    # Text and digits alternate; of two numbers the one with more digits is the larger.
    pieces = re.split("([0-9]+)", fact_id)
    numbers = [piece.lstrip("0") if odd % 2 else piece for odd, piece in enumerate(pieces)]
    return [(len(piece) if odd % 2 else 0, piece) for odd, piece in enumerate(numbers)], fact_id


def _check_same_fact(fact: Fact, there: Mapping[Any, Any], start: int | None) -> None:
    here = {name: as_utf8(getattr(fact, name)) for name in SCORED}
    # A subject that occurs once is found without its place, so that only two places can contradict each other.
    if start is not None and fact.subject_start is not None:
        there, here = {**there, "subject_start": start}, {**here, "subject_start": fact.subject_start}
    found = differences(there, here)
    if found:
        raise StoreError(
            f"the store has another fact {fact.id!r} ({'; '.join(found)}): give another folder for another set of facts"
        )
