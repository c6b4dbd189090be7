"""What a tokenizer makes of a text: ids, the characters behind each, its text for people.

A text is never put into a chat template; one that already is a rendered template is tokenized as it stands.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from fasttrace.errors import ModelError, PromptError

Offsets = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Encoding:
    """A text as the model sees it.

    Attributes:
        ids: tokens, those that the tokenizer puts in front included.
        offsets: characters of the text behind each token, half open, empty where there are none; None: not known.
        notes: what was done to the tokenizer's own answer.
    """

    ids: list[int]
    offsets: Offsets | None
    notes: list[str]


NEEDED = ("__call__", "decode", "convert_ids_to_tokens")
"""What fasttrace asks of a tokenizer."""


def check_tokenizer(tokenizer: Any) -> Any:
    """Hands on a Hugging Face tokenizer, or None.

    Raises:
        ModelError: it is something else; it says what to give in its place.
    """
    if tokenizer is None:
        return None
    found = f"the tokenizer is {_kind(tokenizer)}"
    if isinstance(tokenizer, str | os.PathLike):
        raise ModelError(f"{found}: load it with AutoTokenizer.from_pretrained({os.fspath(tokenizer)!r})")
    if isinstance(tokenizer, type):
        raise ModelError(f"{found}: give a loaded one, {tokenizer.__name__}.from_pretrained(NAME)")
    missing = [name for name in NEEDED if not callable(getattr(tokenizer, name, None))]
    if not missing:
        return tokenizer
    if type(tokenizer).__module__.split(".")[0] == "tokenizers":
        raise ModelError(f"{found}: wrap it, transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)")
    if hasattr(tokenizer, "tokenizer"):
        raise ModelError(f"{found}, a processor of texts and images: give its tokenizer, processor.tokenizer")
    raise ModelError(
        f"{found}, which has no {' and no '.join(missing)}: give a Hugging Face tokenizer, such as "
        "AutoTokenizer.from_pretrained(NAME) or a processor's .tokenizer, or None to give prompts as token ids"
    )


def _kind(value: Any) -> str:
    if isinstance(value, str | os.PathLike):
        return f"the text {os.fspath(value)!r}"
    kind = value if isinstance(value, type) else type(value)
    return f"{'the class' if kind is value else 'a'} {kind.__module__}.{kind.__qualname__}"


def token_text(tokenizer: Any, token_id: int) -> str:
    """A token for people: its text with its leading space, its id without a tokenizer.

    Models have more rows of logits than their tokenizer has tokens where the vocabulary is padded: such a token is
    its id in brackets, "<50300>".
    """
    if tokenizer is None:
        return str(token_id)
    text, piece = _or_none(tokenizer.decode, [token_id]), _or_none(tokenizer.convert_ids_to_tokens, token_id)
    if text is None or (piece is None and not text):
        return f"<{token_id}>"
    spaced = piece is not None and piece.startswith("▁")  # SentencePiece decoders drop the first space
    return f" {text}" if spaced and not text.startswith(" ") else text


def decoded(tokenizer: Any, ids: Sequence[int], **options: Any) -> str:
    """The text of some tokens, those included that the tokenizer does not have."""
    text = _or_none(tokenizer.decode, list(ids), **options)
    return "".join(token_text(tokenizer, token_id) for token_id in ids) if text is None else text


def _or_none(name: Callable[..., Any], ids: Any, **options: Any) -> str | None:
    """What a tokenizer calls tokens; None where it cannot, which each kind says in another way."""
    try:
        text = name(ids, **options)
    except Exception:  # IndexError, KeyError, TypeError, OverflowError, pyo3's own: a name is never worth a trace
        return None
    return text if isinstance(text, str) else None


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that stands alone, without special tokens."""
    if tokenizer is None:
        raise PromptError(f"{text!r} is text and there is no tokenizer; give token ids, or Tracer(model, tokenizer)")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PromptError(f"{text!r} has half of a character (a lone surrogate), which no tokenizer takes") from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_text(tokenizer: Any, text: str) -> Encoding:
    """Tokenizes a text that the model is to continue.

    What the tokenizer puts in front (BOS) stays, once; what it puts at the end (EOS) is dropped.

    Raises:
        PromptError: no tokenizer, no tokens, or other tokens with special tokens than without.
    """
    ids = plain_ids(tokenizer, text)
    if not ids:
        raise PromptError(f"the prompt is empty: {text!r} gives no tokens; give at least one word")
    offsets = _offsets(tokenizer, text, ids)
    front, notes = _front(tokenizer, text, ids)
    return Encoding(front + ids, None if offsets is None else [*[(0, 0)] * len(front), *offsets], notes)


def _front(tokenizer: Any, text: str, ids: list[int]) -> tuple[list[int], list[str]]:
    """Special tokens to put before a text's own tokens."""
    whole = list(tokenizer(text)["input_ids"])
    starts = (start for start in range(len(whole)) if whole[start : start + len(ids)] == ids)
    start = next(starts, None)
    if start is None:
        raise PromptError(
            f"the tokenizer splits {text!r} in one way with special tokens and in another without, so what it adds "
            "cannot be told from the text; give the prompt as token ids"
        )
    front, back = whole[:start], whole[start + len(ids) :]
    notes = []
    if front and ids[: len(front)] == front:
        notes.append(f"the prompt already begins with {decoded(tokenizer, front)!r}: the tokenizer's own was left out")
        front = []
    if back:
        notes.append(f"the tokenizer ends texts with {decoded(tokenizer, back)!r}: left out, for the model to continue")
    return front, notes


def _offsets(tokenizer: Any, text: str, ids: list[int]) -> Offsets | None:
    if getattr(tokenizer, "is_fast", False):
        return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    texts = [token_text(tokenizer, token_id) for token_id in ids]
    joined = "".join(texts)
    if joined not in (text, f" {text}"):  # only tokens that spell the text out say where they stand in it
        return None
    shift = len(joined) - len(text)
    return [(max(start, 0), stop) for start, stop in pairwise(accumulate(map(len, texts), initial=-shift))]
