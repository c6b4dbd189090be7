"""Whether running text has a space between a prompt and its continuation.

The rule looks at characters alone. There is a space where two words meet, or a word and a sign, a quote or a bracket
that opens; there is none inside a word, behind what opens, before what closes, and in scripts without spaces. Where
writers differ, the answer is not sure, and `targets` tells the user which token was taken.
"""

# ruff: noqa: RUF001 (quotes and dashes of all kinds are what this is about)

import re
import unicodedata
from dataclasses import dataclass

__all__ = ["UNSPACED_SCRIPTS", "Space", "is_spaced_word", "is_unspaced", "is_word", "space_between"]

UNSPACED_SCRIPTS = {
    *("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HALFWIDTH", "FULLWIDTH", "IDEOGRAPHIC", "BOPOMOFO"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
}
"""Scripts without spaces between words, by the first word of their characters' Unicode names."""

OPENING = {"“": "„”", "‘": "‚’", "«": "»", "‹": "›", "”": "“„”", "’": "‘‚’", "»": "«", "›": "‹"}
"""Quotes that can close, and those that open what they close: “x”, German „x“, »x«, Swedish ”x”."""

DOUBLE = '"`'
"""Quotes that look the same on both sides."""

APOSTROPHES = "'’"
UNSURE = "…/·‧"
"""Punctuation that, unlike ".", has a space before it in some texts even where it is all that follows."""

GLUED_BEHIND = "#@\\¿¡"
"""Punctuation that has no space behind it."""

SPACED_BEFORE = "#@&*\\¿¡§¶•†‡"
"""Punctuation that has a space before it."""

SYMMETRIC = "/&*•·‧"
"""Punctuation that has a space behind it where it has one before it."""

MOSTLY = 0.75
"""Share of a text's letters of one script that makes the text one of that script."""

CLITIC = re.compile(r"['’‘](s|t|re|ve|ll|d|m|n)\b", re.IGNORECASE)
ZERO_WIDTH_SPACE = "\u200b"


@dataclass(frozen=True)
class Space:
    """What belongs between two texts.

    Attributes:
        put: a space.
        sure: writers do not differ.
    """

    put: bool
    sure: bool = True


NEVER, RATHER_NOT, YES = Space(False), Space(False, sure=False), Space(True)


def space_between(before: str, after: str) -> Space:
    """Tells whether a space belongs between a text and its continuation, both as typed.

    Args:
        before: the text; empty: nothing that a word could be part of, such as a chat template's token.
        after: the continuation.

    Returns:
        The space, which is never put where one of the two brings whitespace of its own.
    """
    before, after = _without_marks_at_end(before), _without_marks_at_start(after)
    if not before or not after or before[-1].isspace() or after[0].isspace() or before[-1] == ZERO_WIDTH_SPACE:
        return NEVER
    if is_unspaced(before[-1]) and is_unspaced(after[0]):
        return NEVER
    behind, ahead = _behind(before), _ahead(before, after)
    if not behind.put or not ahead.put:
        no_sure = any(side.sure for side in (behind, ahead) if not side.put)
        return NEVER if no_sure else RATHER_NOT
    return _between_scripts(before, after)


def is_word(character: str) -> bool:
    """Whether a character is part of a word: a letter, a digit, a mark on one, or an underscore."""
    return unicodedata.category(character)[0] in "LMN" or character == "_"


def is_spaced_word(character: str) -> bool:
    """Whether a character belongs to a word of a script that puts spaces between words."""
    return unicodedata.category(character)[0] in "LMN" and not is_unspaced(character)


def is_unspaced(character: str) -> bool:
    """Whether a character is of a script without spaces between words, its punctuation included."""
    if unicodedata.name(character, "").split(" ")[0] in UNSPACED_SCRIPTS:
        return True
    return unicodedata.category(character)[0] == "P" and unicodedata.east_asian_width(character) in "WF"


def _is_mark(character: str) -> bool:
    """Whether a character only changes the one before it, or cannot be seen."""
    category = unicodedata.category(character)
    is_skin_tone = "\U0001f3fb" <= character <= "\U0001f3ff"
    return (category in ("Mn", "Mc", "Me", "Cf") or is_skin_tone) and character != ZERO_WIDTH_SPACE


def _without_marks_at_end(text: str) -> str:
    end = len(text)
    while end and _is_mark(text[end - 1]):
        end -= 1
    return text[:end]


def _without_marks_at_start(text: str) -> str:
    start = 0
    while start < len(text) and unicodedata.category(text[start]) == "Cf" and text[start] != ZERO_WIDTH_SPACE:
        start += 1
    return text[start:]


# What the text allows behind it.


def _behind(before: str) -> Space:
    last, head = before[-1], before[:-1]
    category = unicodedata.category(last)
    if last in OPENING or last in DOUBLE or last in APOSTROPHES:
        return _behind_quote(last, head)
    if category[0] in "LN" or category == "Pe" or (category == "So" and last != "\ufffd"):
        return YES
    if category == "Ps":
        return NEVER
    if category == "Sc":  # "5 €" is an amount; "€" waits for one
        return YES if head.rstrip()[-1:].isdigit() else NEVER
    if category == "Po" and last not in SYMMETRIC:
        return NEVER if last in GLUED_BEHIND else YES
    if category in ("Pd", "Sm") or last in SYMMETRIC:  # "a - b" and "a-b", "2 + 2" and "2+2"
        has_space_before = not head or head[-1].isspace()
        return YES if has_space_before and last != "~" else NEVER if category == "Pd" else RATHER_NOT
    return RATHER_NOT


def _behind_quote(quote: str, head: str) -> Space:
    if quote in APOSTROPHES and head and is_word(head[-1]) and not _is_open(head, "'‘‚"):
        # French "l'eau" has no space, the plural's "students' book" has one.
        return YES if re.search(r"\w\ws$", head) else RATHER_NOT
    if not _closes(quote, head):
        # A French « has a space behind it, a German » and a Swedish ” have none.
        return RATHER_NOT if quote in "«‹" or unicodedata.category(quote) == "Pf" else NEVER
    return YES


def _closes(quote: str, head: str) -> bool:
    """Whether a quote ends what is quoted, by what stands before it."""
    opened = any(_is_open(head, opener) for opener in OPENING.get(quote, "") if opener != quote)
    if not head or head[-1].isspace():
        return quote in "«»‹›" and opened
    if unicodedata.category(head[-1]) in ("Ps", "Pd", "Sm", "Pi"):
        return False
    return opened or unicodedata.category(quote) != "Pi"


def _is_open(text: str, openers: str) -> bool:
    """Whether one of some quotes opens something in the text that nothing closes."""
    depth = 0
    for place, character in enumerate(text):
        inside_word = 0 < place < len(text) - 1 and is_word(text[place - 1]) and is_word(text[place + 1])
        if inside_word:
            continue  # an apostrophe
        follows_word = place > 0 and (is_word(text[place - 1]) or text[place - 1] in ".,!?…")
        if character in openers and not follows_word:
            depth += 1
        elif depth and any(opener in OPENING.get(character, character) for opener in openers):
            depth -= 1
    return depth > 0


# What the continuation allows before it.


def _ahead(before: str, after: str) -> Space:
    first, rest = after[0], after[1:]
    category = unicodedata.category(first)
    behind_digit = before[-1].isdigit()
    if first in OPENING or first in DOUBLE or first in APOSTROPHES:
        return _ahead_of_quote(before, first, rest)
    if category[0] == "N":  # "3." and "14", "10:" and "30"
        return RATHER_NOT if before[-1] in ".,:/" and before[-2:-1].isdigit() else YES
    if category[0] == "L" or category in ("Ps", "Sm"):
        return YES
    if category[0] == "M" or category == "Pe":
        return NEVER
    if category == "Sc":
        return RATHER_NOT if behind_digit else YES
    if (category == "Pd" or first == ".") and rest[:1].isdigit():  # a minus, a decimal point
        return RATHER_NOT if behind_digit else YES
    if category == "So":
        return RATHER_NOT if first in "°™®\ufffd" else YES
    if category == "Po" and first in SPACED_BEFORE:
        return YES
    return NEVER if category == "Po" and len(after.rstrip()) == 1 and first not in UNSURE else RATHER_NOT


def _ahead_of_quote(before: str, quote: str, rest: str) -> Space:
    if quote in DOUBLE:
        is_open = before.count(quote) % 2 == 1
        if not is_open or quote in rest:
            return YES
        return RATHER_NOT if any(map(is_word, rest)) else NEVER
    if CLITIC.match(quote + rest) and is_word(before[-1]):
        return NEVER
    if quote in APOSTROPHES:
        closes_later = re.search(rf"\w[.,!?…]?[{APOSTROPHES}](?!\w)", rest)
        return YES if closes_later or rest[:1].isdigit() else RATHER_NOT
    if any(_is_open(before, opener) for opener in OPENING[quote]):
        return NEVER
    quoted = any(quote in OPENING.get(character, "") for character in rest)
    return YES if unicodedata.category(quote) == "Pi" or quoted else RATHER_NOT


# Scripts.


def _between_scripts(before: str, after: str) -> Space:
    """The space between two texts that would have one in a script with spaces."""
    if is_unspaced(before[-1]):
        letters = [character for character in before if unicodedata.category(character)[0] == "L"]
        of_spaced_text = sum(map(is_spaced_word, letters)) > MOSTLY * len(letters)
        return RATHER_NOT if of_spaced_text else NEVER
    if not is_unspaced(after[0]):
        return YES
    if unicodedata.category(after[0])[0] == "P" and unicodedata.category(after[0]) != "Ps":
        return NEVER
    return _after_last_word(before)


def _after_last_word(before: str) -> Space:
    """A word of a script without spaces follows: "is 東京" has a space, "用Google搜" and "2024年" have none."""
    word = re.search(r"[\w\u0300-\u036f]+(?=\W*$)", before)
    if word is None:
        return YES
    if any(map(is_unspaced, word[0])):
        return NEVER
    return RATHER_NOT if word[0].isdigit() else YES
