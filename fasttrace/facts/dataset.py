"""Facts: prompts with a subject and an expected answer, from the files that people have.

Rows that cannot be traced are found here, before a model is loaded, and kept with their place and the reason; the
others are used.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd

from fasttrace.checks import flag, path_of, shown, whole_number
from fasttrace.errors import PlanError, PromptError, StoreError
from fasttrace.facts.columns import normal
from fasttrace.facts.formats import Row, Rows, check_columns, read_rows, rows_of_json, rows_of_table
from fasttrace.facts.rows import Fact, checked, fact_of

__all__ = ["BUILTIN", "BadRow", "Fact", "FactSet", "check_answers", "read_facts"]

BUILTIN = "builtin"
"""The name of the set of facts that comes with fasttrace."""

HOPELESS = 10_000
"""Rows without a fact among them, after which no more are read: the source may have no end."""

SHOWN = 3
"""Malformed rows that a message names; all of them are in the set."""

logger = logging.getLogger("fasttrace")


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. As text it is place and reason: "line 3: subject ...".

    Attributes:
        line: its place, counted from 1. In a text file the line on which the row begins: of CSV the header is
            line 1, and a row may span several. Elsewhere the number of the row.
        reason: what is wrong with it.
        unit: what `line` counts: "line" in .json, .jsonl and .csv; "entry" in a .json list that stands on one
            line; "row" in parquet and in objects.
    """

    line: int | None
    reason: str
    unit: str = "line"

    def __str__(self) -> str:
        return self.reason if self.line is None else f"{self.unit} {self.line}: {self.reason}"


@dataclass(frozen=True)
class FactSet:
    """The facts of one source, in its order; its length and its items are those of `facts`.

    Attributes:
        name: the file's name, "builtin", or the type of the object they came from.
        facts: at least one when read by `read_facts`; ids are unique.
        bad: the rows that were skipped.
        subjects: those of all facts of the source, also beyond a limit, to measure noise on; by default those of
            `facts`.
        columns: names that were found in the rows.
    """

    name: str
    facts: tuple[Fact, ...]
    bad: tuple[BadRow, ...] = ()
    subjects: tuple[str, ...] = ()
    columns: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        """Takes the facts' own subjects where none are given."""
        if not self.subjects:
            object.__setattr__(self, "subjects", tuple(fact.subject for fact in self.facts))

    def __len__(self) -> int:
        return len(self.facts)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.facts)


def read_facts(source: Any, *, strict: bool = False, limit: int | None = None) -> FactSet:
    """Reads facts, and skips the rows that cannot be used.

    A fact has prompt and subject, and may have target, foil, id and relation. Each is also found under the names that
    ROME, CounterFact, KnowEdit, LAMA and others use (`facts.columns.COLUMNS` lists them: attribute, answer,
    ground_truth, obj_label, ...), in any case and with spaces, hyphens or underscores; the first of these that is not
    null counts, and the first of a list of answers. A column that only seems to hold answers is refused by name; other
    columns are ignored. Without id the fact is named by its row's number, from 0. Null, NaN and empty cells of CSV are
    None.

    The subject has to occur in the prompt once, space around it aside: as a whole word, or else at all. In a prompt
    with {}, or a column template, that is its place, and it may occur elsewhere too.

    Args:
        source: "builtin"; the path of a file, UTF-8: .json (a list, such as ROME's known facts and CounterFact),
            .jsonl, .csv (with commas) or .parquet; a table of pandas, polars, pyarrow or numpy; a Hugging Face
            Dataset; a dict of columns; or any iterable of mappings or facts.
        strict: stop at the first malformed row.
        limit: give that many facts; None gives all. The rest of a source that is there as a whole (a file, a table, a
            list) is read for its subjects, so that noise that is measured on them is the same without the limit; an
            iterator is left where it is.

    Raises:
        StoreError: the source cannot be read, or its columns are not those of facts.
        PromptError: no fact in it, or with `strict` a malformed row; it names the place and the reason.
    """
    strict, limit = flag("strict", strict, error=PromptError), None if limit is None else _limit(limit)
    name, found = _rows_of(source)
    gathered = _Gathered()
    gathered.read(found, strict, limit, whole=not isinstance(source, Iterator))
    facts, bad = gathered.facts, gathered.bad
    if not facts:
        raise PromptError(f"no facts in {found.name}: {_listed(bad) or 'it is empty'}; give at least one usable row")
    if bad:
        logger.warning("%s: skipped %d of %d rows: %s", found.name, len(bad), len(bad) + len(facts), _listed(bad))
    if gathered.notes:
        noted = [f"{found.unit} {line}: {note}" for line, note in gathered.notes]
        logger.warning("%s: taken otherwise than written, %d times: %s", found.name, len(noted), _listed(noted))
    for told in gathered.told:
        logger.warning("%s: %s", found.name, told)
    if isinstance(source, FactSet):
        return FactSet(name, tuple(facts), tuple(bad), source.subjects, source.columns)
    return FactSet(name, tuple(facts), tuple(bad), tuple(gathered.subjects), tuple(gathered.columns))


def _limit(limit: Any) -> int:
    try:
        return whole_number("limit", limit, 1)
    except PlanError:
        raise PromptError(f"limit is {shown(limit)}: give at least 1, or None for all facts") from None


def check_answers(facts: FactSet) -> None:
    """Refuses a set without a single answer, for what asks whether the model knows them.

    Raises:
        PromptError: no fact has a target; it names the columns that were found.
    """
    if any(fact.target is not None for fact in facts):
        return
    columns = f"its columns are {', '.join(facts.columns)}; rename" if facts.columns else "give"
    raise PromptError(
        f"require_correct asks which facts the model knows, and none of the {len(facts)} in {facts.name} has an "
        f"answer: {columns} the one that holds the answers {'to ' if facts.columns else 'as '}target"
    )


def _listed(bad: Sequence[Any]) -> str:
    more = [f"and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    return "; ".join([*map(str, bad[:SHOWN]), *more])


# From a source to rows.


def _rows_of(source: Any) -> tuple[str, Rows]:
    """A source's name, and its rows."""
    if isinstance(source, str) and source == BUILTIN:
        content = resources.files("fasttrace").joinpath("facts", "facts.json").read_text(encoding="utf-8")
        return BUILTIN, rows_of_json(content, "the built-in set")
    if isinstance(source, str | os.PathLike):
        path = path_of("source", source)
        return path.name, read_rows(path)
    name = source.name if isinstance(source, FactSet) else type(source).__name__
    if not isinstance(source, pd.DataFrame | pd.Series):
        table = rows_of_table(source, name)
        if table is not None:
            return name, table
    return name, Rows(name, "row", (Row(number, row) for number, row in enumerate(_values_of(source, name), start=1)))


def _values_of(source: Any, name: str) -> Iterable[Any]:
    """The rows of an object; the columns of a frame or a Hugging Face Dataset are checked before."""
    if isinstance(source, pd.DataFrame):
        check_columns(source.columns, name)
        return source.to_dict("records")
    if isinstance(source, np.ndarray) and source.dtype.names is not None:
        check_columns(source.dtype.names, name)
        return [dict(zip(source.dtype.names, row, strict=True)) for row in source.ravel().tolist()]
    if isinstance(source, Mapping):
        return _rows_of_columns(source, name)
    if not _is_iterable(source):
        raise StoreError(f"found {name}: give 'builtin', the path of a file, a DataFrame, or an iterable of facts")
    columns = getattr(source, "column_names", None)
    if isinstance(columns, list):
        check_columns(columns, name)
    return source


def _rows_of_columns(source: Mapping[Any, Any], name: str) -> list[dict[Any, Any]]:
    """The rows of a dict of columns."""
    keys = ", ".join(map(str, source))
    is_columns = all(isinstance(values, list | tuple | np.ndarray | pd.Series) for values in source.values())
    if not is_columns or "subject" not in map(normal, map(str, source)):
        raise StoreError(f"found one {name} with {keys}: give a list of facts, or one split of a DatasetDict")
    check_columns(source, name)
    lengths = {str(column): len(values) for column, values in source.items()}
    if len(set(lengths.values())) > 1:
        each = ", ".join(f"{column} {length}" for column, length in lengths.items())
        raise StoreError(f"the columns of a {name} differ in length ({each}): give them a value for every fact")
    return [dict(zip(source, row, strict=True)) for row in zip(*source.values(), strict=True)]


def _is_iterable(source: Any) -> bool:
    """Whether it has rows; bytes have none, and arrays of no axis only look as if they had."""
    if isinstance(source, bytes | bytearray | memoryview | type):
        return False
    try:
        iter(source)
    except Exception:  # whatever the object does when it is asked
        return False
    return True


# From rows to facts.


class _Gathered:
    """What has been read of a source so far.

    Attributes:
        facts, bad: the good rows up to the limit, and the bad ones among them.
        subjects: those of all good rows, also beyond the limit.
        columns: names found, in order.
        notes: what to tell of single rows, each with its place.
        told: what to tell of all rows, each sentence once.
    """

    def __init__(self):
        self.facts: list[Fact] = []
        self.bad: list[BadRow] = []
        self.subjects: list[str] = []
        self.columns: dict[str, None] = {}
        self.notes: list[tuple[int, str]] = []
        self.told: dict[str, None] = {}

    def read(self, found: Rows, strict: bool, limit: int | None, whole: bool) -> None:
        """Reads rows: behind the limit subjects alone, and only of a source that is there as a whole.

        With `strict` it stops at a bad row.
        """
        places: dict[str, str] = {}
        for number, row in enumerate(found.rows):
            full = len(self.facts) == limit
            try:
                fact = self._fact_of(row, number)
                _check_new(fact.id, places, f"{found.unit} {row.line}")
            except PromptError as error:
                if full:
                    continue
                self.bad.append(BadRow(row.line, str(error), found.unit))
                if strict:
                    raise PromptError(f"{found.name}, {self.bad[-1]}; correct it, or skip it without strict") from None
                if not self.facts and len(self.bad) == HOPELESS:
                    break
                continue
            self.subjects.append(fact.subject)
            if not full:
                self.facts.append(fact)
                if not isinstance(row.values, Fact):
                    self.notes += [(row.line, note) for note in fact.notes]
            if len(self.facts) == limit and not whole:
                break

    def _fact_of(self, row: Row, number: int) -> Fact:
        """Reads a row; the error's message is the reason why it cannot be used."""
        if row.reason is not None:
            raise PromptError(row.reason)
        if isinstance(row.values, Fact):
            return checked(row.values)
        if isinstance(row.values, Mapping):
            self.columns |= dict.fromkeys(map(str, row.values))
        fact, told = fact_of(row.values, number)
        self.told |= dict.fromkeys(told)
        return fact


def _check_new(fact_id: str, places: dict[str, str], place: str) -> None:
    if fact_id in places:
        raise PromptError(f"id {fact_id!r} is already that of {places[fact_id]}: ids have to be unique")
    places[fact_id] = place
