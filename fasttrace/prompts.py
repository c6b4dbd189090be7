"""Text to Prompt: token ids, subject span, target token.

Nothing is guessed silently: a subject that is absent or ambiguous, and a target that is not one token, are errors
that show the tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fasttrace.errors import PromptError


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
    """

    text: str | None
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    span: tuple[int, int]
    subject: str | None
    target_id: int | None


def encode(
    tokenizer: Any,
    prompt: str | Sequence[int],
    subject: str | tuple[int, int],
    target: str | int | None,
    *,
    vocabulary: int,
    max_positions: int | None = None,
    first_target_token: bool = False,
) -> Prompt:
    """Tokenizes a prompt and finds its subject and target.

    Args:
        tokenizer: a Hugging Face tokenizer; None if everything is given as token ids.
        prompt: text, or token ids.
        subject: text that occurs once in the prompt, or a half-open token span.
        target: text that is one token (mind its leading space), a token id, or None for the clean top token.
        vocabulary: number of token ids the model knows.
        max_positions: longest prompt the model takes.
        first_target_token: of a target of several tokens, take the first.

    Raises:
        PromptError: empty or too long prompt, subject or target that cannot be found; it shows the tokens.
    """
    text = prompt if isinstance(prompt, str) else None
    ids, offsets = _tokenized(tokenizer, text) if text is not None else (_checked_ids(prompt), None)
    if not ids:
        raise PromptError("the prompt is empty; give at least one token")
    if max(ids) >= vocabulary or min(ids) < 0:
        raise PromptError(f"the prompt has token id {max(ids)}, the model knows 0..{vocabulary - 1}")
    if max_positions is not None and len(ids) > max_positions:
        raise PromptError(f"the prompt has {len(ids)} tokens, the model has positions for {max_positions}; shorten it")
    tokens = tuple(token_text(tokenizer, token_id) for token_id in ids)
    span = _span_of(subject, text, offsets, tokens)
    return Prompt(
        text=text,
        token_ids=tuple(ids),
        tokens=tokens,
        span=span,
        subject=_subject_text(tokenizer, subject, ids[slice(*span)]),
        target_id=_target_id(tokenizer, target, vocabulary, first_target_token),
    )


def token_text(tokenizer: Any, token_id: int) -> str:
    """A token for people: its text, or its id without a tokenizer."""
    return str(token_id) if tokenizer is None else tokenizer.decode([token_id])


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that stands alone, without special tokens."""
    if tokenizer is None:
        raise PromptError(f"{text!r} is text and there is no tokenizer; give token ids, or Tracer(model, tokenizer)")
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _checked_ids(prompt: Sequence[Any]) -> list[int]:
    ids = list(prompt)
    if not all(isinstance(token_id, int) for token_id in ids):
        raise PromptError(f"a prompt is text or a list of whole token ids; found {ids!r}")
    return ids


def _tokenized(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
    if tokenizer is None:
        raise PromptError("the prompt is text and there is no tokenizer; give token ids, or Tracer(model, tokenizer)")
    if not text.strip():
        raise PromptError("the prompt is empty; give at least one word")
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer(text)["input_ids"], None
    encoding = tokenizer(text, return_offsets_mapping=True)
    return encoding["input_ids"], encoding["offset_mapping"]


def _span_of(subject: Any, text: str | None, offsets: Any, tokens: tuple[str, ...]) -> tuple[int, int]:
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
    return begin, end


def _found_span(subject: str, text: str | None, offsets: Any, tokens: tuple[str, ...]) -> tuple[int, int]:
    wanted = subject.strip()
    if text is None or offsets is None:
        raise PromptError(
            f"subject {subject!r} is text, but the prompt's characters are not known (token ids, or a tokenizer "
            f"without offsets); give a half-open token span: {_numbered(tokens)}"
        )
    if not wanted:
        raise PromptError(f"the subject is empty; give its text as in the prompt, or a token span: {_numbered(tokens)}")
    starts = [i for i in range(len(text)) if text.startswith(wanted, i)]
    if not starts:
        raise PromptError(f"subject {wanted!r} does not occur in the prompt; its tokens are {_numbered(tokens)}")
    spans = [_tokens_between(offsets, start, start + len(wanted)) for start in starts]
    if len(spans) > 1:
        raise PromptError(
            f"subject {wanted!r} occurs {len(spans)} times in the prompt, at token spans "
            f"{', '.join(map(str, spans))}; give one of them as subject: {_numbered(tokens)}"
        )
    return spans[0]


def _tokens_between(offsets: Sequence[tuple[int, int]], begin: int, end: int) -> tuple[int, int]:
    """Tokens that share a character with text[begin:end]; pieces of one character all do."""
    inside = [i for i, (start, stop) in enumerate(offsets) if start < end and stop > begin]
    if not inside:
        raise PromptError(f"characters {begin}..{end} of the prompt belong to no token; give the subject as a span")
    return inside[0], inside[-1] + 1


def _subject_text(tokenizer: Any, subject: Any, ids: Sequence[int]) -> str | None:
    if isinstance(subject, str):
        return subject.strip()
    return None if tokenizer is None else tokenizer.decode(ids).strip()


def _target_id(tokenizer: Any, target: Any, vocabulary: int, first: bool) -> int | None:
    if target is None:
        return None
    if isinstance(target, str):
        return _only_token(tokenizer, target, first)
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < vocabulary:
        raise PromptError(f"target is {target!r}; give text, or a token id from 0 to {vocabulary - 1}")
    return target


def _only_token(tokenizer: Any, target: str, first: bool) -> int:
    ids = plain_ids(tokenizer, target)
    if not ids:
        raise PromptError("the target is empty; give the text of one token, or None for the clean run's top token")
    if len(ids) > 1 and not first:
        pieces = [token_text(tokenizer, token_id) for token_id in ids]
        raise PromptError(
            f"target {target!r} is {len(ids)} tokens, {pieces}; give one that is a single token, "
            f"or set first_target_token to score {pieces[0]!r}"
        )
    return ids[0]


def _numbered(tokens: tuple[str, ...]) -> str:
    return " ".join(f"{number}:{token!r}" for number, token in enumerate(tokens))
