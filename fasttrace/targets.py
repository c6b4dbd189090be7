"""The target: the token that the model would see after the prompt.

"Seattle" and " Seattle" are different tokens, and which of them a text stands for depends on the prompt. So the
target is tokenized behind the prompt, not alone.
"""

import unicodedata
from collections.abc import Sequence
from typing import Any

from fasttrace.errors import PromptError
from fasttrace.tokenization import plain_ids, token_text

SPACE_FOLLOWS = ".,:;!?)]}%…"
"""Punctuation that a space separates from the next word."""

UNSPACED_SCRIPTS = {
    *("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HALFWIDTH", "FULLWIDTH", "IDEOGRAPHIC", "BOPOMOFO"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
}
"""Scripts without spaces between words, by the first word of their characters' Unicode names."""

BEFORE_TARGET = ("\n", "a", ".", "0")
"""Texts to tokenize a target behind when the prompt cannot serve; the first that stays a token of its own does."""


def target_token(
    tokenizer: Any, target: str, text: str | None, prompt_ids: Sequence[int], first: bool = False
) -> tuple[int, list[str]]:
    """Finds the token that a target is.

    A space is put before the target where two words would meet: the prompt ends with a letter, a digit or one of
    SPACE_FOLLOWS, the target begins with a letter or digit, and neither is of a script without spaces.

    Args:
        tokenizer: of the model.
        target: text, as a user wrote it.
        text: the prompt; None if it was given as token ids.
        prompt_ids: the prompt's tokens.
        first: of a target of several tokens, take the first.

    Returns:
        The token id, and what the user should be told about it.

    Raises:
        PromptError: no token, an unknown one, or several; it shows them.
    """
    if not target:
        raise PromptError("the target is empty; give the text of one token, or None for the clean run's top token")
    _check_known(tokenizer, target)
    continued = _with_space(_end_of_prompt(tokenizer, text, prompt_ids), target)
    ids, together = _ids_after(tokenizer, text, continued)
    as_typed = ids if continued == target else _ids_after(tokenizer, text, target)[0]
    _check_count(tokenizer, continued, ids, as_typed, first)
    notes = (
        _space_note(tokenizer, target, ids, as_typed),
        "" if together else _apart_note(tokenizer, text, continued, ids),
        _blank_note(tokenizer, continued, ids),
    )
    return ids[0], [note for note in notes if note]


def _end_of_prompt(tokenizer: Any, text: str | None, prompt_ids: Sequence[int]) -> str:
    """The text that a target follows; none after a special token, such as a chat template's."""
    last = prompt_ids[-1:]
    special = tokenizer.decode(last) and not tokenizer.decode(last, skip_special_tokens=True)
    if special:
        return ""
    return token_text(tokenizer, last[0]) if text is None else text


def _with_space(before: str, target: str) -> str:
    words_meet = _is_spaced_word(target[0]) and before and (before[-1] in SPACE_FOLLOWS or _is_spaced_word(before[-1]))
    return f" {target}" if words_meet else target


def _is_spaced_word(character: str) -> bool:
    """Whether a character belongs to a word of a script that puts spaces between words."""
    script = unicodedata.name(character, "").split(" ")[0]
    return unicodedata.category(character)[0] in "LMN" and script not in UNSPACED_SCRIPTS


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


def _check_known(tokenizer: Any, target: str) -> None:
    ids = plain_ids(tokenizer, target)
    if tokenizer.unk_token_id in ids and target.strip() != tokenizer.unk_token:
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


def _space_note(tokenizer: Any, target: str, ids: list[int], as_typed: list[int]) -> str:
    if ids == as_typed:
        return ""
    scored = f"target {target!r} follows the prompt after a space: scoring {_named(tokenizer, ids[0])}"
    if len(as_typed) == 1:
        return f"{scored}; for {_named(tokenizer, as_typed[0])} give that id as the target"
    return scored


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


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    return [token_text(tokenizer, token_id) for token_id in ids]


def _named(tokenizer: Any, token_id: int) -> str:
    return f"{token_text(tokenizer, token_id)!r} (token id {token_id})"
