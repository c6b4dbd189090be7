"""What a tokenizer makes of a text: ids, the characters behind each, its text for people.

A text is never put into a chat template; one that already is a rendered template is tokenized as it stands.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from fasttrace.errors import PromptError

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


def token_text(tokenizer: Any, token_id: int) -> str:
    """A token for people: its text with its leading space, or its id without a tokenizer."""
    if tokenizer is None:
        return str(token_id)
    text = tokenizer.decode([token_id])
    piece = tokenizer.convert_ids_to_tokens(token_id)
    spaced = isinstance(piece, str) and piece.startswith("▁")  # SentencePiece decoders drop the first space
    return f" {text}" if spaced and not text.startswith(" ") else text


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that stands alone, without special tokens."""
    if tokenizer is None:
        raise PromptError(f"{text!r} is text and there is no tokenizer; give token ids, or Tracer(model, tokenizer)")
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
        notes.append(f"the prompt already begins with {tokenizer.decode(front)!r}: the tokenizer's own was left out")
        front = []
    if back:
        notes.append(f"the tokenizer ends texts with {tokenizer.decode(back)!r}: left out, for the model to continue")
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
