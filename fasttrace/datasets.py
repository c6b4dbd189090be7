"""Facts: prompts with a subject and an expected answer, from the files that people have.

A row that cannot be traced is told apart here, before a model is loaded: it is kept with its place and the reason,
and the others go on.
"""

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fasttrace.errors import PromptError, StoreError
from fasttrace.fact_files import COLUMNS, NESTED, Row, Rows, check_columns, read_rows, rows_of_json

__all__ = ["BUILTIN", "BadRow", "Fact", "FactSet", "read_facts"]

BUILTIN = "builtin"
"""The name of the set of facts that comes with fasttrace."""

SHOWN = 3
"""Malformed rows that a message names; all of them are in the set."""

logger = logging.getLogger("fasttrace")


@dataclass(frozen=True)
class Fact:
    """One fact to trace.

    Attributes:
        id: names it in a store; unique in its set.
        prompt: text that the model continues.
        subject: text that occurs in the prompt.
        target: the expected answer, of which the first token is scored; None: the clean run's top token.
        foil: an answer that is wrong, kept beside the fact.
        relation: what kind of fact it is, such as ROME's "P103".
    """

    id: str
    prompt: str
    subject: str
    target: str | None = None
    foil: str | None = None
    relation: str | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that is no fact. As text it is both: "line 3: subject ...".

    Attributes:
        line: its place, counted from 1. In a text file the line on which the row begins: of CSV the header is
            line 1, and a row may span several. Without lines, the number of the row.
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
        subjects: of all facts of the source, those behind a limit included, for noise that is measured on them; by
            default those of `facts`.
    """

    name: str
    facts: tuple[Fact, ...]
    bad: tuple[BadRow, ...] = ()
    subjects: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Takes the facts' own subjects where none are given."""
        if not self.subjects:
            object.__setattr__(self, "subjects", tuple(fact.subject for fact in self.facts))

    def __len__(self) -> int:
        return len(self.facts)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.facts)


def read_facts(source: Any, *, strict: bool = False, limit: int | None = None) -> FactSet:
    """Reads facts, and skips the rows that are none.

    A fact has prompt and subject, and may have target (or ROME's attribute), foil, id (known_id, case_id) and
    relation (relation_id); CounterFact's requested_rewrite is understood; other columns are ignored. Without id
    the fact is named by its row's number, from 0. Null, NaN and empty cells of CSV are None. The subject has to
    occur in the prompt once, space around it aside.

    Args:
        source: "builtin"; the path of a file, UTF-8: .json (a list, such as ROME's known facts and CounterFact),
            .jsonl, .csv (with commas) or .parquet; a pandas DataFrame; a Hugging Face Dataset; or any iterable of
            mappings or facts.
        strict: stop at the first malformed row.
        limit: give that many facts; None gives all. The rest of a source that is there as a whole (a file, a table, a
            list) is read for its subjects, so that noise that is measured on them is the same without the limit; an
            iterator is left where it is.

    Raises:
        StoreError: the source cannot be read, or its columns are not those of facts.
        PromptError: no fact in it, or with `strict` a malformed row; it names the place and the reason.
    """
    if limit is not None and limit < 1:
        raise PromptError(f"limit is {limit}: give at least 1, or None for all facts")
    name, found = _rows_of(source)
    whole = not isinstance(source, Iterator)
    facts, bad, subjects = _sort(found, strict, limit, whole)
    if not facts:
        raise PromptError(f"no facts in {found.name}: {_listed(bad) or 'it is empty'}; give at least one good row")
    if bad:
        logger.warning("%s: skipped %d of %d rows: %s", found.name, len(bad), len(bad) + len(facts), _listed(bad))
    return FactSet(name, tuple(facts), tuple(bad), source.subjects if isinstance(source, FactSet) else tuple(subjects))


def _listed(bad: list[BadRow]) -> str:
    more = [f"and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    return "; ".join([*map(str, bad[:SHOWN]), *more])


# From a source to rows.


def _rows_of(source: Any) -> tuple[str, Rows]:
    """A source's name, and its rows."""
    if isinstance(source, str) and source == BUILTIN:
        content = resources.files("fasttrace").joinpath("data", "facts.json").read_text(encoding="utf-8")
        return BUILTIN, rows_of_json(content, "the built-in set")
    if isinstance(source, str | os.PathLike):
        return Path(source).name, read_rows(Path(source))
    name = source.name if isinstance(source, FactSet) else type(source).__name__
    return name, Rows(name, "row", _numbered(_values_of(source, name)))


def _values_of(source: Any, name: str) -> Iterable[Any]:
    """The rows of an object; the columns of a frame or a Hugging Face Dataset are checked before."""
    if isinstance(source, pd.DataFrame):
        check_columns(source.columns, name)
        return source.to_dict("records")
    if isinstance(source, Mapping):
        keys = ", ".join(map(str, source))
        raise StoreError(f"found one {name} with {keys}: give a list of facts, or one split of a DatasetDict")
    if not isinstance(source, Iterable) or isinstance(source, bytes):
        raise StoreError(f"found {name}: give 'builtin', the path of a file, a DataFrame, or an iterable of facts")
    columns = getattr(source, "column_names", None)
    if isinstance(columns, list):
        check_columns(columns, name)
    return source


def _numbered(values: Iterable[Any]) -> Iterator[Row]:
    return (Row(number, value) for number, value in enumerate(values, start=1))


# From rows to facts.


def _sort(found: Rows, strict: bool, limit: int | None, whole: bool) -> tuple[list[Fact], list[BadRow], list[str]]:
    """The good up to `limit`, the bad among them, and the subjects of all good ones.

    With `strict` it stops at a bad row; unless `whole`, at the limit.
    """
    facts, bad, subjects, places = [], [], [], {}
    for number, row in enumerate(found.rows):
        full = len(facts) == limit
        try:
            fact = _fact_of(row, number)
            _check_new(fact.id, places, f"{found.unit} {row.line}")
        except PromptError as error:
            if full:
                continue
            bad.append(BadRow(row.line, str(error), found.unit))
            if strict:
                raise PromptError(f"{found.name}, {bad[-1]}; correct it, or skip it without strict") from None
            continue
        subjects.append(fact.subject)
        if not full:
            facts.append(fact)
        if len(facts) == limit and not whole:
            break
    return facts, bad, subjects


def _check_new(fact_id: str, places: dict[str, str], place: str) -> None:
    if fact_id in places:
        raise PromptError(f"id {fact_id!r} is already that of {places[fact_id]}: ids have to be unique")
    places[fact_id] = place


def _fact_of(row: Row, number: int) -> Fact:
    """Reads a row; the error's message is the reason why it is none."""
    if row.reason is not None:
        raise PromptError(row.reason)
    values = _flat(row.values)
    texts = {field: _text_of(values, names) for field, names in COLUMNS.items() if field != "id"}
    prompt, subject = (_required(texts.pop(field), field, values) for field in ("prompt", "subject"))
    _check_subject(subject, prompt)
    return Fact(_id_of(values, number), prompt, subject, **texts)


def _flat(values: Any) -> Mapping[str, Any]:
    """A row's columns, CounterFact's and a fact's own included."""
    if isinstance(values, Fact):
        return dataclasses.asdict(values)
    if not isinstance(values, Mapping):
        raise PromptError(f"it is {_short(values)}: expected an object with prompt and subject")
    rewrite = values.get(NESTED)
    if _is_null(rewrite):
        return values
    if not isinstance(rewrite, Mapping):
        raise PromptError(f"{NESTED} is {_short(rewrite)}: expected an object with prompt and subject")
    answers = {name: _answer(rewrite.get(name)) for name in ("target_true", "target_new")}
    return {**values, **rewrite, **answers, "prompt": _filled(rewrite)}


def _answer(value: Any) -> Any:
    return value.get("str", value) if isinstance(value, Mapping) else value


def _filled(rewrite: Mapping[str, Any]) -> Any:
    """CounterFact's prompt with the subject in its place; what is not text is left to be refused."""
    template, subject = rewrite.get("prompt"), rewrite.get("subject")
    if not isinstance(template, str) or not isinstance(subject, str):
        return template
    if template.count("{}") != 1:
        raise PromptError(
            f"prompt {_short(template)} has {template.count('{}')} places {{}} for the subject: expected 1"
        )
    return template.replace("{}", subject)


def _first(values: Mapping[str, Any], names: Iterable[str]) -> tuple[str, Any]:
    """The first of some columns that is not null, and its value; None without one."""
    given = ((name, values[name]) for name in names if name in values)
    return next(((name, value) for name, value in given if not _is_null(value)), ("", None))


def _is_null(value: Any) -> bool:
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def _text_of(values: Mapping[str, Any], names: Iterable[str]) -> str | None:
    name, value = _first(values, names)
    return None if value is None else _checked_text(name, value)


def _checked_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise PromptError(f"{name} is {_short(value)}: expected text")
    if not value.strip():
        raise PromptError(f"{name} is empty: expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PromptError(f"{name} is {_short(value)}, with half of a character that cannot be stored") from None
    return str(value)  # a plain one, also of numpy's


def _required(value: str | None, name: str, values: Mapping[str, Any]) -> str:
    if value is None:
        found = ", ".join(str(key) for key in values if not _is_null(values[key])) or "nothing"
        raise PromptError(f"{name} is missing: expected prompt and subject, found {found}")
    return value


def _check_subject(subject: str, prompt: str) -> None:
    """Holds a subject to the rule of `prompts.encode`, so that a row that passes can be traced."""
    wanted = subject.strip()
    times = sum(prompt.startswith(wanted, start) for start in range(len(prompt)))
    if times == 0:
        raise PromptError(f"subject {wanted!r} does not occur in prompt {prompt!r}: write it as it stands there")
    if times > 1:
        raise PromptError(f"subject {wanted!r} occurs {times} times in prompt {prompt!r}: expected once")


def _id_of(values: Mapping[str, Any], number: int) -> str:
    """A fact's id as text; frames make whole numbers to floats where one is missing."""
    name, value = _first(values, COLUMNS["id"])
    if value is None:
        return str(number)
    if isinstance(value, float | np.floating):
        if not value.is_integer():
            raise PromptError(f"{name} is {value}: expected text or a whole number")
        return str(int(value))
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return str(value)
    return _checked_text(name, value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
