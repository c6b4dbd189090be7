"""From a row to a fact, or to the reason why the row cannot be used."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fasttrace.checks import shown, text
from fasttrace.errors import PromptError
from fasttrace.facts.columns import (
    COLUMNS,
    NESTED,
    answer_of,
    by_normal_name,
    columns_like_answers,
    first_given,
    is_null,
    told_of_answers,
)
from fasttrace.prompts.subjects import places_of, what_is_there

__all__ = ["Fact", "checked", "fact_of"]

Named = Mapping[str, tuple[str, Any]]


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
        subject_start: the character of the prompt at which the subject begins, where its source says so, as a
            template's {} does; None: the subject is searched for.
        notes: what was changed from what is written, a sentence each; not compared, and stored with the result, not
            with the fact.
    """

    id: str
    prompt: str
    subject: str
    target: str | None = None
    foil: str | None = None
    relation: str | None = None
    subject_start: int | None = None
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)


def fact_of(row: Any, number: int) -> tuple[Fact, list[str]]:
    """Reads a row.

    Args:
        row: its columns.
        number: the row's number, from 0; it is the id of a fact without one.

    Returns:
        The fact, and what to tell the user once about all rows of this kind.

    Raises:
        PromptError: the row cannot be used; the message is the reason.
    """
    values, is_nested = _flat(row)
    by_name = by_normal_name(values)
    prompt, template = (_text_of(by_name, field) for field in ("prompt", "template"))
    if prompt is None and template is None:
        raise _missing("prompt", values)
    subject = _text_of(by_name, "subject")
    if subject is None:
        raise _missing("subject", values)
    if is_nested or prompt is None:
        prompt, start, notes = _filled(prompt or template or "", subject)
    else:
        prompt, start, notes = _prompt_of(prompt, template, subject, _start_of(by_name))
    target, more = _answer(by_name, "target")
    foil, _ = _answer(by_name, "foil")
    like = columns_like_answers(values)
    if like:
        raise PromptError(
            f"its answer seems to be in {' or '.join(like)}, and no such column is read: call the one that has the "
            "answers target, or leave it out"
        )
    texts = (prompt, subject, target, foil, _text_of(by_name, "relation"))
    return _placed(Fact(_id_of(by_name, number), *texts, start, notes + more)), told_of_answers(by_name)


def checked(fact: Fact) -> Fact:
    """A fact that was made elsewhere, checked by the rules for rows.

    Raises:
        PromptError: it breaks a rule.
    """
    for name in ("id", "prompt", "subject", "target", "foil", "relation"):
        value = getattr(fact, name)
        if value is not None or name in ("id", "prompt", "subject"):
            text(name, value, error=PromptError)
    return _placed(fact)


def _flat(values: Any) -> tuple[Mapping[Any, Any], bool]:
    """A row's columns, those inside of CounterFact's column included, and whether it has that column."""
    if not isinstance(values, Mapping):
        raise PromptError(
            f'it is {_kind(values)}, {shown(values)}: a fact must be a mapping with "prompt" and "subject"'
        )
    rewrite = values.get(NESTED)
    if is_null(rewrite):
        return values, False
    if not isinstance(rewrite, Mapping):
        raise PromptError(
            f'{NESTED} is {_kind(rewrite)}, {shown(rewrite)}: expected a mapping with "prompt" and "subject"'
        )
    return {name: value for name, value in values.items() if name != NESTED} | dict(rewrite), True


def _kind(value: Any) -> str:
    return {str: "a string", type(None): "null", list: "a list"}.get(type(value), f"of type {type(value).__name__}")


def _prompt_of(
    prompt: str, template: str | None, subject: str, start: int | None
) -> tuple[str, int | None, tuple[str, ...]]:
    """A prompt with the subject put in the place of {}; where that is; and what the user should be told."""
    if start is not None:
        return prompt, start, ()
    if template is not None and template.count("{}") == 1 and template.replace("{}", subject) == prompt:
        return _filled(template, subject)
    if prompt.count("{}") != 1:
        return prompt, None, ()
    filled, start, notes = _filled(prompt, subject)
    if subject.strip() not in prompt:
        return filled, start, notes
    note = f"the prompt has subject {subject.strip()!r} and {{}}: the subject was put in the place of {{}} as well"
    return filled, start, (note,)


def _filled(template: str, subject: str) -> tuple[str, int, tuple[str, ...]]:
    count = template.count("{}")
    if count != 1:
        raise PromptError(f"prompt {shown(template)} has {count} places {{}} for the subject: expected 1")
    start = template.index("{}") + len(subject) - len(subject.lstrip())
    return template.replace("{}", subject), start, ()


def _start_of(by_name: Named) -> int | None:
    name, value = first_given(by_name, COLUMNS["subject_start"])
    if value is None:
        return None
    number = str(value.item() if isinstance(value, np.generic) else value).removesuffix(".0")
    if isinstance(value, bool) or not (number.isascii() and number.isdecimal()):
        raise PromptError(f"{name} is {shown(value)}: expected the number of a character of the prompt, from 0")
    return int(number)


def _text_of(by_name: Named, field: str) -> str | None:
    name, value = first_given(by_name, COLUMNS[field])
    return None if value is None else text(name, value, error=PromptError)


def _answer(by_name: Named, field: str) -> tuple[str | None, tuple[str, ...]]:
    """An answer, and what the user should be told about it."""
    name, value = first_given(by_name, COLUMNS[field])
    value, note = answer_of(name, value)
    if is_null(value):
        return None, ()
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        raise PromptError(f"{name} is {value}: expected text; write a number in quotes")
    return text(name, value, error=PromptError), (note,) if note else ()


def _missing(name: str, values: Mapping[Any, Any]) -> PromptError:
    found = ", ".join(str(key) for key in values if not is_null(values[key])) or "nothing"
    return PromptError(f"{name} is missing: expected prompt and subject, found {found}")


def _placed(fact: Fact) -> Fact:
    """A fact whose subject stands in its prompt once, by the rule of `prompts.encode`, so that it can be traced."""
    subject, prompt, start = fact.subject.strip(), fact.prompt, fact.subject_start
    if start is not None:
        if start < 0 or not prompt.startswith(subject, start):
            raise PromptError(f"subject {subject!r} does not stand at character {start} of {prompt!r}: correct one")
        return fact
    places = places_of(subject, prompt)
    if not places:
        it_has = f"prompt {prompt!r}{what_is_there(subject, prompt)}"
        raise PromptError(f"subject {subject!r} does not occur in {it_has}: write it as it stands there")
    if len(places) > 1:
        raise PromptError(
            f"subject {subject!r} occurs {len(places)} times in prompt {prompt!r}: expected once; "
            "write {} in the prompt where it is meant"
        )
    place = places[0]
    if not place.note:
        return fact
    found = prompt[place.begin : place.end]
    written = fact.subject if found == subject else found
    return dataclasses.replace(fact, subject=written, notes=(*fact.notes, place.note))


def _id_of(by_name: Named, number: int) -> str:
    """A fact's id as text; frames make whole numbers to floats where one is missing."""
    name, value = first_given(by_name, COLUMNS["id"])
    if value is None:
        return str(number)
    if isinstance(value, float | np.floating):
        if not value.is_integer():
            raise PromptError(f"{name} is {value}: expected text or a whole number")
        return str(int(value))
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return str(value)
    return text(name, value, error=PromptError)
