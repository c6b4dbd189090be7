"""Pairs: a prompt and its counterfactuals, which have as many tokens and differ in a few of them.

Runs of a pair are compared position by position, so that prompts whose tokenizations have unequal lengths are no pair:
they are refused, with both shown side by side.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from typing import Any

from fasttrace.checks import items, shown, text, token_ids, whole_number
from fasttrace.errors import PlanError, PromptError, UnequalLengthsError
from fasttrace.prompts.prompt import Prompt, token_text
from fasttrace.prompts.targets import target_token
from fasttrace.prompts.tokenization import encode_text

__all__ = ["differing", "with_counterfactual", "with_foil"]

logger = logging.getLogger("fasttrace")

AGREE = 3
"""Tokens that are shown of a stretch in which both prompts agree, at each end."""


def with_counterfactual(tokenizer: Any, prompt: Prompt, counterfactual: Any, vocabulary: int) -> Prompt:
    """A prompt with its counterfactuals; one that is equal to it is noted.

    Args:
        tokenizer: a Hugging Face tokenizer; None if everything is given as token ids.
        prompt: encoded; where it has no subject, its span is from the first to the last token that differs.
        counterfactual: a text or token ids; or a list of these, one run each.
        vocabulary: number of token ids the model knows.

    Raises:
        PromptError: there is none, one has no tokens or such as the model does not know.
        UnequalLengthsError: one has another number of tokens than the prompt.
    """
    given = _listed(counterfactual)
    found = tuple(_ids_of(tokenizer, prompt.token_ids, each, vocabulary) for each in given)
    places, notes, span = differing(prompt.token_ids, found), prompt.notes, prompt.span
    if not places:
        notes += ("the counterfactual is equal to the prompt: every cell is the baseline",)
        logger.warning("%s", notes[-1])
    elif prompt.subject is None:
        span = places[0], places[-1] + 1
    texts = tuple(each if isinstance(each, str) else None for each in given)
    return replace(prompt, counterfactuals=found, counterfactual_texts=texts, span=span, notes=notes)


def _listed(counterfactual: Any) -> list[Any]:
    if isinstance(counterfactual, str):
        return [counterfactual]
    expected = "a text, token ids, or a list of texts or of lists of token ids"
    given = items("counterfactual", counterfactual, expected, error=PromptError)
    if not given:
        raise PromptError(f"counterfactual is empty: give {expected}")
    return [given] if all(map(_is_id, given)) else given


def _is_id(value: Any) -> bool:
    try:
        whole_number("counterfactual", value)
    except PlanError:
        return False
    return True


def _ids_of(tokenizer: Any, prompt_ids: Sequence[int], one: Any, vocabulary: int) -> tuple[int, ...]:
    if isinstance(one, str):
        one = text("counterfactual", one, error=PromptError)
        ids = encode_text(tokenizer, one).ids
    else:
        ids = token_ids("counterfactual", one)
    unknown = [token_id for token_id in ids if not 0 <= token_id < vocabulary]
    if unknown:
        raise PromptError(f"the counterfactual has token id {unknown[0]}, the model knows 0..{vocabulary - 1}")
    if len(ids) != len(prompt_ids):
        raise UnequalLengthsError(_unequal(tokenizer, prompt_ids, ids))
    return tuple(ids)


def _unequal(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """What differs, as two lines with the same tokens one under the other."""
    columns = list(_columns(tokenizer, prompt_ids, ids))
    widths = [max(map(len, column)) for column in columns]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in zip(*columns, strict=True)
    ]
    return (
        f"the counterfactual has {len(ids)} tokens and the prompt {len(prompt_ids)}, and runs are compared position by "
        "position: replace words by words of as many tokens\n" + "\n".join(lines)
    )


def _columns(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> Iterator[tuple[str, str]]:
    yield "prompt", "counterfactual"
    matcher = SequenceMatcher(None, list(prompt_ids), list(ids), autojunk=False)
    for same, begin, end, other_begin, other_end in matcher.get_opcodes():
        if same == "equal":
            agreed = _stretch(tokenizer, prompt_ids[begin:end])
            yield agreed, agreed
        else:
            yield _texts(tokenizer, prompt_ids[begin:end]), _texts(tokenizer, ids[other_begin:other_end])


def _stretch(tokenizer: Any, ids: Sequence[int]) -> str:
    if len(ids) <= 2 * AGREE:
        return _texts(tokenizer, ids)
    return f"{_texts(tokenizer, ids[:AGREE])} ... {_texts(tokenizer, ids[-AGREE:])}"


def _texts(tokenizer: Any, ids: Sequence[int]) -> str:
    return " ".join(repr(token_text(tokenizer, token_id)) for token_id in ids)


def differing(prompt_ids: Sequence[int], counterfactuals: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Positions at which a prompt differs from any of its counterfactuals."""
    return tuple(
        position
        for position, token_id in enumerate(prompt_ids)
        if any(other[position] != token_id for other in counterfactuals)
    )


def with_foil(tokenizer: Any, prompt: Prompt, foil: Any, vocabulary: int, first: bool = False) -> Prompt:
    """A prompt with the answer that its target is compared with.

    Args:
        tokenizer: a Hugging Face tokenizer; None if the foil is a token id.
        prompt: encoded.
        foil: as a target is given to `encode`.
        vocabulary: number of token ids the model knows.
        first: of a foil of several tokens, take the first.

    Raises:
        PromptError: it is no token, or the target.
    """
    if isinstance(foil, str):
        try:
            foil_id, notes = target_token(tokenizer, foil, prompt.text, prompt.token_ids, first)
        except PromptError as error:
            raise PromptError(f"foil: {error}") from error
    else:
        (foil_id,) = token_ids("foil", [foil])
        notes = []
    if not 0 <= foil_id < vocabulary:
        raise PromptError(f"foil is {shown(foil)}; give text, or a token id from 0 to {vocabulary - 1}")
    if foil_id == prompt.target_id:
        raise PromptError(
            f"foil {shown(foil)} and target are the same token {token_text(tokenizer, foil_id)!r}: give another foil"
        )
    return replace(prompt, foil_id=foil_id, notes=(*prompt.notes, *(f"foil: {note}" for note in notes)))
