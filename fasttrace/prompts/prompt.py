"""Text to Prompt: token ids, subject span, target token.

Nothing is guessed silently: a subject that is absent or ambiguous, and a target that is not one token, are errors
that show the tokens; what is taken otherwise than typed is logged and kept in the prompt's notes.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fasttrace.checks import flag, span_of, token_ids, whole_number
from fasttrace.checks import text as checked_text
from fasttrace.errors import PromptError
from fasttrace.prompts.subjects import Place, places_of, what_is_there
from fasttrace.prompts.targets import target_token
from fasttrace.prompts.tokenization import Encoding, Offsets, decoded, encode_text, plain_ids, token_text

__all__ = ["Prompt", "encode", "plain_ids", "subjects_of", "token_text"]

logger = logging.getLogger("fasttrace")


@dataclass(frozen=True)
class Prompt:
    """What is traced.

    Attributes:
        text: the prompt as given; None for token ids.
        token_ids: the prompt as the model sees it, BOS included where the tokenizer adds one.
        tokens: the same for people.
        span: subject tokens, half open.
        subject: the subject as text; None without tokenizer.
        target_id: token whose probability is scored; None: the clean run's top token.
        notes: what differs from the prompt, subject and target as typed, a sentence each; logged as a warning.
        foil_id: token that the target is compared with; None: there is none.
        counterfactuals: token ids of prompts of as many tokens, which take the place of noise; see `prompts.pairs`.
        counterfactual_texts: the same as given; None for token ids.
    """

    text: str | None
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    span: tuple[int, int]
    subject: str | None
    target_id: int | None
    notes: tuple[str, ...] = ()
    foil_id: int | None = None
    counterfactuals: tuple[tuple[int, ...], ...] = ()
    counterfactual_texts: tuple[str | None, ...] = ()


def encode(
    tokenizer: Any,
    prompt: str | Sequence[int],
    subject: str | tuple[int, int] | None,
    target: str | int | None,
    *,
    vocabulary: int,
    max_positions: int | None = None,
    subject_start: int | None = None,
    first_target_token: bool = False,
    tell: bool = True,
) -> Prompt:
    """Tokenizes a prompt and finds its subject and target.

    Args:
        tokenizer: a Hugging Face tokenizer; None if everything is given as token ids.
        prompt: text, or token ids. A chat template is not applied.
        subject: text that occurs once in the prompt as a whole word, or else once, or a half-open token span; None: the
            prompt has none, its span is all of it.
        target: text that is one token behind the prompt, a token id, or None for the clean top token. A space is put
            before it where running text has one; see `target_token`.
        vocabulary: number of token ids the model knows.
        max_positions: longest prompt the model takes.
        subject_start: the character of the prompt at which the subject's text begins; None: it is searched for.
        first_target_token: take the first token of a target of several.
        tell: log the notes as a warning.

    Raises:
        PromptError: empty or too long prompt, subject or target that cannot be found; it shows the tokens.
    """
    text = _plain(prompt, "prompt") if isinstance(prompt, str) else None
    encoding = Encoding(token_ids("prompt", prompt), None, []) if text is None else _encoded(tokenizer, text)
    ids = encoding.ids
    if subject is not None:
        subject = _plain(subject, "subject") if isinstance(subject, str) else span_of("subject", subject)
    first_target_token = flag("first_target_token", first_target_token, error=PromptError)
    _check_ids("the prompt", tokenizer, ids, vocabulary)
    _check_length(ids, max_positions)
    tokens = tuple(token_text(tokenizer, token_id) for token_id in ids)
    span, subject_notes = _span_of(subject, subject_start, text, encoding.offsets, tokens)
    target_id, target_notes = _target_of(tokenizer, target, text, ids, first_target_token)
    _check_target(tokenizer, target, target_id, vocabulary)
    notes = (*encoding.notes, *subject_notes, *target_notes)
    if flag("tell", tell, error=PromptError) and notes:
        logger.warning("%s", "; ".join(notes))
    return Prompt(
        text=text,
        token_ids=tuple(ids),
        tokens=tokens,
        span=span,
        subject=_subject_text(tokenizer, subject, ids[slice(*span)]),
        target_id=target_id,
        notes=notes,
    )


def subjects_of(tokenizer: Any, subjects: Iterable[str | Sequence[int]], vocabulary: int) -> list[list[int]]:
    """Subjects to measure noise on, as token ids.

    Args:
        tokenizer: a Hugging Face tokenizer; None if they are given as token ids.
        subjects: texts or lists of token ids.
        vocabulary: number of token ids the model knows.

    Raises:
        PromptError: there are none, or one has no tokens, or tokens that the model does not know.
    """
    found = [(item, plain_ids(tokenizer, item) if isinstance(item, str) else list(item)) for item in subjects]
    if not found:
        raise PromptError("there are no subjects to measure the noise on: give texts or lists of token ids")
    for item, ids in found:
        if not ids:
            raise PromptError(f"a subject to measure the noise on is {item!r}, which has no tokens; leave it out")
        _check_ids(f"subject {item!r}", tokenizer, ids, vocabulary)
    return [ids for _, ids in found]


def _plain(value: str, name: str) -> str:
    """A text of Python's own; whether it says enough is judged where it is tokenized."""
    return checked_text(name, value, error=PromptError, empty=True)


def _encoded(tokenizer: Any, text: str) -> Encoding:
    if not text.strip():
        raise PromptError("the prompt is empty; give at least one word")
    return encode_text(tokenizer, text)


def _check_ids(name: str, tokenizer: Any, ids: Sequence[int], vocabulary: int) -> None:
    unknown = [token_id for token_id in ids if not 0 <= token_id < vocabulary]
    if unknown:
        raise PromptError(
            f"{name} has token id {unknown[0]}, the model knows 0..{vocabulary - 1}{_too_many(tokenizer, vocabulary)}"
        )


def _too_many(tokenizer: Any, vocabulary: int) -> str:
    """What to look at when a tokenizer has ids that its model has not."""
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else 0
    return f"; the tokenizer has {size} tokens: is it this model's, with its embeddings resized?" * (size > vocabulary)


def _check_length(ids: Sequence[int], max_positions: int | None) -> None:
    if max_positions is not None and len(ids) > max_positions:
        raise PromptError(f"the prompt has {len(ids)} tokens, the model has positions for {max_positions}; shorten it")


def _span_of(
    subject: str | tuple[int, int] | None,
    start: int | None,
    text: str | None,
    offsets: Offsets | None,
    tokens: tuple[str, ...],
) -> tuple[tuple[int, int], list[str]]:
    """The subject's tokens, and what the user should be told about them."""
    if subject is None:
        return (0, len(tokens)), []
    if isinstance(subject, str):
        return _found_span(subject.strip(), start, text, offsets, tokens)
    begin, end = subject
    if not 0 <= begin < end <= len(tokens):
        raise PromptError(
            f"subject span {(begin, end)} covers no tokens of a prompt of {len(tokens)}; "
            f"a span is half open, 0 <= begin < end <= {len(tokens)}: {_numbered(tokens)}"
        )
    return (begin, end), []


def _found_span(
    wanted: str, start: int | None, text: str | None, offsets: Offsets | None, tokens: tuple[str, ...]
) -> tuple[tuple[int, int], list[str]]:
    if text is None or offsets is None:
        raise PromptError(
            f"subject {wanted!r} is text, but the prompt's characters are not known (token ids, or a slow "
            f"tokenizer whose tokens do not spell the text); give a half-open token span: {_numbered(tokens)}"
        )
    if not wanted:
        raise PromptError(f"the subject is empty; give its text as in the prompt, or a token span: {_numbered(tokens)}")
    place = _place_of(wanted, start, text, offsets, tokens)
    span = _tokens_between(offsets, tokens, place.begin, place.end)
    covered = _covered(text, offsets[slice(*span)], place.begin, place.end)
    if covered != text[place.begin : place.end]:
        shared = list(tokens[slice(*span)])
        note = f"subject {wanted!r} shares its tokens {shared} with the text around it: {covered!r}"
        return span, [*filter(None, [place.note]), note]
    return span, [*filter(None, [place.note])]


def _place_of(wanted: str, start: int | None, text: str, offsets: Offsets, tokens: tuple[str, ...]) -> Place:
    if start is not None:
        if start < 0 or not text.startswith(wanted, start):
            raise PromptError(f"subject {wanted!r} does not stand at character {start} of {text!r}; correct one")
        return Place(start, start + len(wanted))
    places = places_of(wanted, text)
    if not places:
        there = what_is_there(wanted, text)
        raise PromptError(f"subject {wanted!r} does not occur in the prompt{there}; its tokens are {_numbered(tokens)}")
    if len(places) > 1:
        spans = [_tokens_between(offsets, tokens, place.begin, place.end) for place in places]
        raise PromptError(
            f"subject {wanted!r} occurs {len(spans)} times in the prompt, at token spans "
            f"{', '.join(map(str, spans))}; give one of them as subject: {_numbered(tokens)}"
        )
    return places[0]


def _tokens_between(offsets: Offsets, tokens: tuple[str, ...], begin: int, end: int) -> tuple[int, int]:
    """Tokens that share a character with text[begin:end]; pieces of one character all do, a space before it does not.

    SentencePiece puts a space before a text and gives it the place of the first character.
    """
    sharing = (i for i, (start, stop) in enumerate(offsets) if start < end and stop > begin)
    inside = [i for i in sharing if tokens[i].strip()]
    if not inside:
        raise PromptError(f"characters {begin}..{end} of the prompt belong to no token; give the subject as a span")
    return inside[0], inside[-1] + 1


def _covered(text: str, offsets: Offsets, begin: int, end: int) -> str:
    """text[begin:end] and what else its tokens hold, without space around it."""
    first = min(begin, *(start for start, _ in offsets))
    last = max(end, *(stop for _, stop in offsets))
    return text[first:last].strip()


def _subject_text(tokenizer: Any, subject: Any, ids: Sequence[int]) -> str | None:
    if subject is None:
        return None
    if isinstance(subject, str):
        return subject.strip()
    return None if tokenizer is None else decoded(tokenizer, ids).strip()


def _target_of(
    tokenizer: Any, target: Any, text: str | None, ids: Sequence[int], first: bool
) -> tuple[int | None, list[str]]:
    """The target's token, and what the user should be told about it."""
    if target is None:
        return None, []
    if isinstance(target, str):
        return target_token(tokenizer, _plain(target, "target"), text, ids, first)
    return whole_number("target", target, meaning="a token id; or give text", error=PromptError), []


def _check_target(tokenizer: Any, target: Any, target_id: int | None, vocabulary: int) -> None:
    if target_id is not None and not 0 <= target_id < vocabulary:
        advice = _too_many(tokenizer, vocabulary) if isinstance(target, str) else ""
        raise PromptError(f"target is {target_id}; give text, or a token id from 0 to {vocabulary - 1}{advice}")


def _numbered(tokens: tuple[str, ...]) -> str:
    return " ".join(f"{number}:{token!r}" for number, token in enumerate(tokens))
