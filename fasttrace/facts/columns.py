"""Names of the columns in which people keep facts, and how their values are read."""

import ast
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from fasttrace.checks import shown
from fasttrace.errors import PromptError
from fasttrace.memories import remembered

__all__ = [
    "COLUMNS",
    "NESTED",
    "answer_of",
    "by_normal_name",
    "columns_like_answers",
    "first_given",
    "is_null",
    "is_read",
    "normal",
    "told_of_answers",
]

NESTED = "requested_rewrite"
"""The column in which CounterFact keeps prompt, subject and answers."""

ONE_ANSWER = ("target", "attribute", "target_true", "foil", "target_new", "target_false")
"""Columns that hold one answer, never a list."""

GUESSED = ("gold", "completion", "expected", "solution", "truth", "label", "labels", "object", "obj", "o")
"""Columns that hold the answer in some sets and something else in others: used, and the user is told."""

COLUMNS = {
    "id": ("id", "known_id", "case_id"),
    "prompt": ("prompt",),
    "template": ("template",),
    "subject": ("subject",),
    "subject_start": ("subject_start",),
    "target": (
        *ONE_ANSWER[:3],
        *("target_str", "target_text"),
        *("answer", "answers", "ground_truth", "ground_truths", "correct_answer", "correct_answers"),
        *("expected_answer", "gold_answer", "gold_answers", "true_answer", "gold_label", "obj_label", "object_label"),
        *GUESSED,
    ),
    "foil": ("foil", "target_new", "target_false"),
    "relation": ("relation", "relation_id"),
}
"""The names under which each field of a fact is found; the first that is there and not null counts. Case, spaces,
hyphens and underscores do not: see `normal`."""

LIKE_ANSWERS = re.compile(
    "answer|target|truth|gold|label|obj|completion|expected|solution|response|output|correct|reference|attribute|reply"
)
NOT_ANSWERS = re.compile("^(sub|rel|pred|neg|is)|prompt|question|alias|wrong|incorrect|(id|ids|uri|url|type|index)$")


@remembered()
def normal(name: str) -> str:
    """A column's name without what people vary: "Ground truth" and "groundTruth" are both "groundtruth"."""
    return re.sub(r"[\W_]+", "", name.casefold())


_READ = {normal(name): field for field, names in COLUMNS.items() for name in names}


def is_read(column: Any) -> bool:
    """Whether a column of this name is read, or is looked at because it may hold answers."""
    name = normal(str(column))
    return name in _READ or name == normal(NESTED) or _is_like_answers(name)


def by_normal_name(values: Mapping[Any, Any]) -> dict[str, tuple[str, Any]]:
    """The columns of a row that are read, by their normal names, each with its name as written and its value.

    Raises:
        PromptError: two columns have the same normal name and different values.
    """
    found: dict[str, tuple[str, Any]] = {}
    for column, value in values.items():
        name = normal(str(column))
        if name not in _READ or (is_null(value) and name in found):
            continue
        if name in found and not is_null(found[name][1]) and not _equal(found[name][1], value):
            raise PromptError(f"{found[name][0]} and {column} are one column by name and differ: keep one of them")
        found[name] = (str(column), value)
    return found


def _equal(one: Any, other: Any) -> bool:
    return one is other or repr(one) == repr(other)


def columns_like_answers(values: Mapping[Any, Any]) -> list[str]:
    """Columns that seem to hold a row's answer, if the row has no column that is known to hold it."""
    texts = (str, list, tuple, np.ndarray, Mapping)
    names = {normal(str(column)): str(column) for column, value in values.items() if isinstance(value, texts)}
    if any(_READ.get(normal(str(column))) == "target" for column in values):
        return []
    return [column for name, column in names.items() if name not in _READ and _is_like_answers(name)]


def told_of_answers(by_name: Mapping[str, tuple[str, Any]]) -> list[str]:
    """What to tell the user about the columns that a row's answer was taken from."""
    there = [by_name[normal(name)] for name in COLUMNS["target"] if normal(name) in by_name]
    given = [(name, value) for name, value in there if not is_null(value)]
    if not given:
        return []
    (taken, answer), *others = given
    told = [f"the answers are those of column {taken}, column {name} has others" for name in _differing(answer, others)]
    guessed = f"column {taken} is taken for the answers; if it is something else, rename it"
    return [guessed, *told] if normal(taken) in map(normal, GUESSED) else told


def _differing(answer: Any, others: list[tuple[str, Any]]) -> list[str]:
    return [name for name, value in others if not _equal(value, answer)]


def _is_like_answers(name: str) -> bool:
    return bool(LIKE_ANSWERS.search(name)) and not NOT_ANSWERS.search(name)


def answer_of(name: str, value: Any) -> tuple[Any, str]:
    """The answer in a cell: the first of a list, if the column may hold several; the text of CounterFact's object.

    Args:
        name: column's name, for messages.
        value: the cell's value.

    Returns:
        The answer, of any type, or None; and what to tell the user, empty if nothing.

    Raises:
        PromptError: a list that was written as text.
    """
    if isinstance(value, Mapping) and "str" in value:
        return value["str"], ""
    if isinstance(value, str) and _is_list_as_text(value):
        raise PromptError(f"{name} is {shown(value)}, a list written as text: write one answer there")
    if not isinstance(value, list | tuple | np.ndarray):
        return value, ""
    answers = [answer for answer in value if not is_null(answer)]
    if not answers:
        return None, ""
    if len(answers) > 1 and normal(name) in map(normal, ONE_ANSWER):
        return value, ""
    first, note = answer_of(name, answers[0])
    if len(answers) > 1:
        note = f"{name} has {len(answers)} answers, of which the first is taken: {shown(first)}"
    return first, note


def _is_list_as_text(text: str) -> bool:
    if not (text.strip().startswith("[") and text.strip().endswith("]")):
        return False
    try:
        return isinstance(ast.literal_eval(text.strip()), list)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def is_null(value: Any) -> bool:
    """Whether a cell is empty: None, NaN, or pandas' NA and NaT."""
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def first_given(values: Mapping[str, tuple[str, Any]], names: Iterable[str]) -> tuple[str, Any]:
    """Name and value of the first of some columns that is not null; "" and None if all are."""
    given = (values[normal(name)] for name in names if normal(name) in values)
    return next(((name, value) for name, value in given if not is_null(value)), ("", None))
