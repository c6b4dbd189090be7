"""Where a subject stands in a text.

Whole words come before letters inside other words. Letters that Unicode writes in several ways are the same letters;
other differences (case, quotes, dashes) are shown to the user and not guessed.
"""

# ruff: noqa: RUF001 (quotes and dashes of all kinds are what this is about)

import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fasttrace.prompts.spacing import is_unspaced, is_word

__all__ = ["Place", "places_of", "what_is_there"]

LOOKALIKES = str.maketrans("‘’‚‛`´“”„‟«»‐‑‒–—−", "''''''\"\"\"\"\"\"------")


@dataclass(frozen=True)
class Place:
    """Where a subject stands.

    Attributes:
        begin, end: characters of the text, half open.
        note: what the user should be told; empty if nothing.
    """

    begin: int
    end: int
    note: str = ""


def places_of(subject: str, text: str) -> list[Place]:
    """Finds a subject in a text.

    Args:
        subject: without space around it, not empty.
        text: the prompt.

    Returns:
        Where it stands as a whole word, or else where its letters stand inside words. It is ambiguous if there is
        more than one place.
    """
    places = _places(subject, text)
    whole = [place for place in places if _is_whole(text, *place)]
    return [Place(*place, _note(subject, text, *place)) for place in whole or places]


def what_is_there(subject: str, text: str) -> str:
    """What looks like a subject that is not in a text, as the end of a sentence that says so; empty if nothing does."""
    places = _folded_places(subject, text, _loose)
    if not places:
        return ""
    found = text[slice(*places[0])]
    return f", but {found!r} does ({_difference(found, subject)})"


def _note(subject: str, text: str, begin: int, end: int) -> str:
    found = text[begin:end]
    if found != subject:
        difference = _difference(found, subject)
        return f"subject {subject!r} stands in the prompt as {found!r}, in another Unicode form ({difference})"
    if unicodedata.combining(text[end : end + 1] or " "):
        return f"the last letter of subject {subject!r} has a mark in the prompt: {text[begin : end + 1]!r}"
    return ""


# Words.


def _is_whole(text: str, begin: int, end: int) -> bool:
    """Whether a piece of a text is not part of a longer word."""
    joined_before = begin > 0 and _joined(text[begin - 1], text[begin])
    return not joined_before and not (end < len(text) and _joined(text[end], text[end - 1]))


def _joined(neighbor: str, own: str) -> bool:
    """Whether the character beside a piece makes a longer word of it.

    Nothing tells in scripts without spaces, nor in Korean, where particles follow a word directly.
    """
    if is_unspaced(neighbor) or is_unspaced(own) or (_is_hangul(neighbor) and _is_hangul(own)):
        return False
    return is_word(neighbor)


def _is_hangul(character: str) -> bool:
    return unicodedata.name(character, "").startswith("HANGUL")


# Forms of Unicode.


def _places(wanted: str, text: str) -> list[tuple[int, int]]:
    """All places of a text in another, by the strictest form of Unicode that has one."""
    if text.isascii() and wanted.isascii():
        return _plain_places(wanted, text)
    canonical = _folded_places(wanted, text, _canonical)
    return canonical or _plain_places(wanted, text) or _folded_places(wanted, text, _compatible)


def _plain_places(wanted: str, text: str) -> list[tuple[int, int]]:
    return [(at, at + len(wanted)) for at in _all_places(wanted, text)]


def _all_places(wanted: str, text: str) -> Iterator[int]:
    at = text.find(wanted)
    while at >= 0:
        yield at
        at = text.find(wanted, at + 1)


def _folded_places(wanted: str, text: str, fold: Callable[[str], str]) -> list[tuple[int, int]]:
    """Places at which a text becomes what another one becomes; letters are not cut from their marks."""
    clusters = _clusters(text)
    folded = [fold(text[begin:end]) for begin, end in clusters]
    ends = [0]
    for piece in folded:
        ends.append(ends[-1] + len(piece))
    needle = "".join(fold(wanted[begin:end]) for begin, end in _clusters(wanted))
    found = []
    for at in _all_places(needle, "".join(folded)) if needle else ():
        first, last = bisect_left(ends, at), bisect_left(ends, at + len(needle))
        if ends[first] == at and ends[last] == at + len(needle):
            while not folded[first]:
                first += 1
            found.append((clusters[first][0], clusters[last - 1][1]))
    return found


def _clusters(text: str) -> list[tuple[int, int]]:
    """Letters with the marks on them, and runs of whitespace: what is folded piece by piece and never cut."""
    starts = [0]
    for at in range(1, len(text)):
        is_mark = unicodedata.combining(text[at]) > 0
        in_space = text[at].isspace() and text[at - 1].isspace()
        if not is_mark and not in_space:
            starts.append(at)
    return list(zip(starts, [*starts[1:], len(text)], strict=True))


def _canonical(piece: str) -> str:
    return unicodedata.normalize("NFD", piece)


def _compatible(piece: str) -> str:
    """A piece in the form it shares with others that mean the same: full-width letters, ligatures, spaces."""
    return unicodedata.normalize("NFKD", piece)


def _loose(piece: str) -> str:
    """What a reader takes for the same: without case, the kind of quotes and dashes, and what cannot be seen."""
    seen = "".join(character for character in piece if unicodedata.category(character) != "Cf")
    if seen.isspace():
        return " "
    return unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", seen).casefold().translate(LOOKALIKES))


def _difference(found: str, wanted: str) -> str:
    """The first character that differs, by its number where it may look the same."""
    at = next((at for at, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), None)
    if at is None:
        at = min(len(found), len(wanted))
    there, here = (f"{text[at]!r} U+{ord(text[at]):04X}" if at < len(text) else "nothing" for text in (found, wanted))
    return f"there {there}, here {here}"
