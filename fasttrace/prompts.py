"""Text to Prompt: token ids, subject span, target token.

Nothing is guessed silently: a subject that is absent or ambiguous, and a target that is not one token, are errors
that show the tokens; what is taken otherwise than typed is logged and kept in the prompt's notes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fasttrace.errors import PromptError
from fasttrace.targets import target_token
from fasttrace.tokenization import Encoding, Offsets, encode_text, plain_ids, token_text

__all__ = ["Prompt", "encode", "plain_ids", "token_text"]

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
    """

    text: str | None
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    span: tuple[int, int]
    subject: str | None
    target_id: int | None
    notes: tuple[str, ...] = ()


def encode(
    tokenizer: Any,
    prompt: str | Sequence[int],
    subject: str | tuple[int, int],
    target: str | int | None,
    *,
    vocabulary: int,
    max_positions: int | None = None,
    first_target_token: bool = False,
    tell: bool = True,
) -> Prompt:
    """Tokenizes a prompt and finds its subject and target.

    Args:
        tokenizer: a Hugging Face tokenizer; None if everything is given as token ids.
        prompt: text, or token ids. A chat template is not applied.
        subject: text that occurs once in the prompt, or a half-open token span.
        target: text that is one token behind the prompt, a token id, or None for the clean top token. A space is put
            before it where two words would meet; see `target_token`.
        vocabulary: number of token ids the model knows.
        max_positions: longest prompt the model takes.
        first_target_token: of a target of several tokens, take the first.
        tell: log the notes as a warning.

    Raises:
        PromptError: empty or too long prompt, subject or target that cannot be found; it shows the tokens.
    """
    text = prompt if isinstance(prompt, str) else None
    encoding = _given_ids(prompt) if text is None else _encoded(tokenizer, text)
    ids = encoding.ids
    _check_ids(ids, vocabulary, max_positions)
    tokens = tuple(token_text(tokenizer, token_id) for token_id in ids)
    span, subject_notes = _span_of(subject, text, encoding.offsets, tokens)
    target_id, target_notes = _target_of(tokenizer, target, text, ids, first_target_token)
    _check_target(target_id, vocabulary)
    notes = (*encoding.notes, *subject_notes, *target_notes)
    if notes and tell:
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


def _given_ids(prompt: Sequence[Any]) -> Encoding:
    ids = list(prompt)
    if not all(isinstance(token_id, int) for token_id in ids):
        raise PromptError(f"a prompt is text or a list of whole token ids; found {ids!r}")
    if not ids:
        raise PromptError("the prompt is empty; give at least one token")
    return Encoding(ids, offsets=None, notes=[])


def _encoded(tokenizer: Any, text: str) -> Encoding:
    if not text.strip():
        raise PromptError("the prompt is empty; give at least one word")
    return encode_text(tokenizer, text)


def _check_ids(ids: Sequence[int], vocabulary: int, max_positions: int | None) -> None:
    unknown = [token_id for token_id in ids if not 0 <= token_id < vocabulary]
    if unknown:
        raise PromptError(f"the prompt has token id {unknown[0]}, the model knows 0..{vocabulary - 1}")
    if max_positions is not None and len(ids) > max_positions:
        raise PromptError(f"the prompt has {len(ids)} tokens, the model has positions for {max_positions}; shorten it")


def _span_of(
    subject: Any, text: str | None, offsets: Offsets | None, tokens: tuple[str, ...]
) -> tuple[tuple[int, int], list[str]]:
    """The subject's tokens, and what the user should be told about them."""
    if isinstance(subject, str):
        return _found_span(subject, text, offsets, tokens)
    try:
        begin, end = (int(value) for value in subject)
    except (TypeError, ValueError):
        raise PromptError(f"subject is {subject!r}; give its text, or a half-open token span such as (0, 4)") from None
    if not 0 <= begin < end <= len(tokens):
        raise PromptError(
            f"subject span {(begin, end)} covers no tokens of a prompt of {len(tokens)}; "
            f"a span is half open, 0 <= begin < end <= {len(tokens)}: {_numbered(tokens)}"
        )
    return (begin, end), []


def _found_span(
    subject: str, text: str | None, offsets: Offsets | None, tokens: tuple[str, ...]
) -> tuple[tuple[int, int], list[str]]:
    wanted = subject.strip()
    if text is None or offsets is None:
        raise PromptError(
            f"subject {subject!r} is text, but the prompt's characters are not known (token ids, or a slow "
            f"tokenizer whose tokens do not spell the text); give a half-open token span: {_numbered(tokens)}"
        )
    if not wanted:
        raise PromptError(f"the subject is empty; give its text as in the prompt, or a token span: {_numbered(tokens)}")
    starts = [i for i in range(len(text)) if text.startswith(wanted, i)]
    if not starts:
        raise PromptError(f"subject {wanted!r} does not occur in the prompt; its tokens are {_numbered(tokens)}")
    spans = [_tokens_between(offsets, tokens, start, start + len(wanted)) for start in starts]
    if len(spans) > 1:
        raise PromptError(
            f"subject {wanted!r} occurs {len(spans)} times in the prompt, at token spans "
            f"{', '.join(map(str, spans))}; give one of them as subject: {_numbered(tokens)}"
        )
    span = spans[0]
    covered = _covered(text, offsets[slice(*span)], starts[0], starts[0] + len(wanted))
    shared = f"subject {wanted!r} shares its tokens {list(tokens[slice(*span)])} with the text around it: {covered!r}"
    return span, [shared] if covered != wanted else []


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
    if isinstance(subject, str):
        return subject.strip()
    return None if tokenizer is None else tokenizer.decode(ids).strip()


def _target_of(
    tokenizer: Any, target: Any, text: str | None, ids: Sequence[int], first: bool
) -> tuple[int | None, list[str]]:
    """The target's token, and what the user should be told about it."""
    if isinstance(target, str):
        return target_token(tokenizer, target, text, ids, first)
    return target, []


def _check_target(target_id: Any, vocabulary: int) -> None:
    if target_id is None:
        return
    if isinstance(target_id, bool) or not isinstance(target_id, int) or not 0 <= target_id < vocabulary:
        raise PromptError(f"target is {target_id!r}; give text, or a token id from 0 to {vocabulary - 1}")


def _numbered(tokens: tuple[str, ...]) -> str:
    return " ".join(f"{number}:{token!r}" for number, token in enumerate(tokens))
