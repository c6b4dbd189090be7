"""The target: the token that the model would see after the prompt.

"Seattle" and " Seattle" are different tokens, and which of them a text stands for depends on the prompt. So the
target is tokenized behind the prompt, not alone.
"""

import unicodedata
from collections.abc import Sequence
from typing import Any

from fasttrace.errors import PromptError
from fasttrace.prompts.spacing import Space, space_between
from fasttrace.prompts.tokenization import decoded, plain_ids, token_text

BEFORE_TARGET = ("\n", "a", ".", "0")
"""Texts to tokenize a target behind when the prompt cannot serve; the first that stays a token of its own does."""


def target_token(
    tokenizer: Any, target: str, text: str | None, prompt_ids: Sequence[int], first: bool = False
) -> tuple[int, list[str]]:
    """Finds the token that a target is.

    A space is put before the target where running text has one, see `space_between`; a target that begins with
    whitespace is taken as typed. The token is then the first that follows the prompt's own when both are tokenized
    together.

    Args:
        tokenizer: the model's.
        target: text, as a user wrote it.
        text: the prompt; None if it was given as token ids.
        prompt_ids: the prompt's tokens.
        first: take the first token of a target of several.

    Returns:
        The token id, and what the user should be told about it.

    Raises:
        PromptError: no token, an unknown one, or several; it shows them.
    """
    if not target:
        raise PromptError("the target is empty; give the text of one token, or None for the clean run's top token")
    alone = plain_ids(tokenizer, target)
    _check_known(tokenizer, target, alone)
    before = _end_of_prompt(tokenizer, text, prompt_ids)
    space = Space(put=False) if _is_special(tokenizer, alone[:1]) else space_between(before, target)
    continued = f" {target}" if space.put else target
    ids, together = _ids_after(tokenizer, text, continued)
    other = target if space.put else f" {target}"
    others = _ids_after(tokenizer, text, other)[0] if space.put or not space.sure else []
    _check_count(tokenizer, continued, ids, others if space.put else ids, first)
    notes = (
        _space_note(tokenizer, target, ids, others, space.put, first),
        "" if together else _apart_note(tokenizer, text, continued, ids),
        _blank_note(tokenizer, continued, ids),
        _typed_note(before, target),
    )
    return ids[0], [note for note in notes if note]


def _end_of_prompt(tokenizer: Any, text: str | None, prompt_ids: Sequence[int]) -> str:
    """The text that a target follows; none after a special token, such as a chat template's."""
    if _is_special(tokenizer, prompt_ids[-1:]):
        return ""
    return decoded(tokenizer, prompt_ids) if text is None else text


def _is_special(tokenizer: Any, ids: Sequence[int]) -> bool:
    return bool(decoded(tokenizer, ids)) and not decoded(tokenizer, ids, skip_special_tokens=True)


def _ids_after(tokenizer: Any, text: str | None, continued: str) -> tuple[list[int], bool]:
    """Tokens of a continuation, and whether they are what follows when it is tokenized with the prompt."""
    behind_prompt = [] if text is None else _ids_behind(tokenizer, text, continued)
    if behind_prompt:
        return behind_prompt, True
    candidates = (_ids_behind(tokenizer, before, continued) for before in BEFORE_TARGET)
    return next(filter(None, candidates), []), False


def _ids_behind(tokenizer: Any, before: str, continued: str) -> list[int]:
    """Tokens that follow those of a text; none if the border between the two falls inside a token."""
    head, both = plain_ids(tokenizer, before), plain_ids(tokenizer, before + continued)
    return both[len(head) :] if head and head == both[: len(head)] else []


def _check_known(tokenizer: Any, target: str, ids: Sequence[int]) -> None:
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in ids and target.strip() != tokenizer.unk_token:
        pieces = _pieces(tokenizer, ids)
        raise PromptError(f"target {target!r} has characters unknown to the tokenizer, {pieces}; give another target")


def _check_count(tokenizer: Any, continued: str, ids: list[int], as_typed: list[int], first: bool) -> None:
    if not ids:
        raise PromptError(f"target {continued!r} gives no token of its own behind the prompt; give a token id")
    if len(ids) == 1 or first:
        return
    pieces = _pieces(tokenizer, ids)
    single = f"; without the space it is one, token id {as_typed[0]}" if len(as_typed) == 1 else ""
    raise PromptError(
        f"target {continued!r} is {len(ids)} tokens, {pieces}{single}; give one that is a single token, "
        f"or set first_target_token to score {pieces[0]!r}"
    )


def _space_note(tokenizer: Any, target: str, ids: list[int], others: list[int], put: bool, first: bool) -> str:
    """Which of two readings of a target is scored, with a space before it and without, and how to get the other."""
    if not others or ids[0] == others[0]:
        return ""
    scored, other = _named(tokenizer, ids[0]), _named(tokenizer, others[0])
    if not put:
        way = "write the target with a space before it, or give that id"
        return f"target {target!r} follows the prompt without a space: scoring {scored}; for {other} {way}"
    scored = f"target {target!r} follows the prompt after a space: scoring {scored}"
    return f"{scored}; for {other} give that id as the target" if first or len(others) == 1 else scored


def _apart_note(tokenizer: Any, text: str | None, continued: str, ids: list[int]) -> str:
    """Why the target was not tokenized with the prompt."""
    scored = _named(tokenizer, ids[0])
    if text is None:
        return f"the prompt is token ids: target {continued!r} was tokenized without it, scoring {scored}"
    together = _pieces(tokenizer, plain_ids(tokenizer, text + continued))[-2:]
    advice = "; drop the whitespace at the prompt's end" if text[-1].isspace() else ""
    return (
        f"prompt and target together would be other tokens, ending in {together}: scoring {scored} on its own{advice}"
    )


def _blank_note(tokenizer: Any, continued: str, ids: list[int]) -> str:
    pieces = _pieces(tokenizer, ids)
    blank = not pieces[0].strip() and continued.strip()
    return f"the first token of target {continued!r}, {pieces}, is only whitespace" if blank else ""


def _typed_note(before: str, target: str) -> str:
    """What hardly anyone types on purpose."""
    if unicodedata.category(target[0]) == "Cf":
        return f"target {target!r} begins with the invisible character U+{ord(target[0]):04X}, which is tokenized too"
    if before[-1:] == " " == target[0]:
        return "the prompt ends in a space and the target begins with one: the model sees both"
    return ""


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    return [token_text(tokenizer, token_id) for token_id in ids]


def _named(tokenizer: Any, token_id: int) -> str:
    return f"{token_text(tokenizer, token_id)!r} (token id {token_id})"
