"""Where running text has a space, and where nobody can be sure."""

# ruff: noqa: RUF001 (quotes and dashes of all kinds are what this is about)

import pytest

from fasttrace.prompts.spacing import Space, space_between

SPACE, NONE, UNSURE = Space(True), Space(False), Space(False, sure=False)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # What a target may begin with.
        *[
            ("It costs", start)
            for start in ("five", "$5", "€5", "-5", "−5", "+5", ".5", "#1", "(5", "[5", "½", "@home", "&")
        ],
        *[
            ("It is by", start)
            for start in ('"Mad Max"', '"', "“Mad”", "‘Mad’", "„Mad“", "«Mad»", "»Mad«", "”Mad”", "'Mad Max'")
        ],
        *[("I feel", start) for start in ("😀", "👍🏽", "¿Qué", "¡Sí", "<b>", "=", "’90s", "`x`", "\u200fx")],
        # What a prompt may end with.
        *[
            (f"The x{end}", "y")
            for end in (".", ",", ":", ";", "!", "?", ")", "]", "}", "%", "…", "™", "°", " 😀", "👍🏽")
        ],
        *[
            (f"It is {quoted}", "by")
            for quoted in ("“x”", "‘x’", "„x“", "‚x‘", "«x»", "« x »", "»x«", '"x"', "'x'", "`x`")
        ],
        ("أين تقع أوسلو؟", "في"),
        ("أوسلو،", "في"),
        ("दिल्ली है।", "हाँ"),
        ("서울은", "한국의"),
        ("The e\u0301", "y"),
        ("the students’", "book"),
        ("Simon &", "Garfunkel"),
        ("2 + 2 =", "4"),
        ("a –", "b"),
        ("5 €", "per"),
        ("The U.S.", "Army"),
        # A script without spaces in a text with them.
        ("The capital of Japan is", "東京"),
        ("Answer:", "東京"),
    ],
)
def test_a_space_goes_where_words_and_signs_meet(before, after):
    assert space_between(before, after) == SPACE


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "y"),
        *[
            (f"The x{end}", "y")
            for end in (" ", "\n", "\t", "\u00a0", "\u3000", "\u200b", " (", " [", "-", "—", " “", " ‘", " „")
        ],
        *[(f"The {end}", "y") for end in ('"', "'", "(“", "¿", "#", "@")],
        *[(f"costs {sign}", "5") for sign in "$€£¥"],
        *[
            ("The x", start)
            for start in (" y", "\n", ".", ",", "!", "?", ")", "]", "%", "؟", "。", "'s", "’s", "‘s", "'ll", "\u0301")
        ],
        ("नमस्त", "े"),
        ('He said "yes', '"'),
        ("He said “yes", "”"),
        ("Er sagte „ja", "“"),
        ("日本の首都は", "東京"),
        ("日本の首都は", "Tokyo"),
        ("首都は「", "東"),
        ("東京", "、大阪"),
        ("首都。", "東"),
        ("用Google", "搜"),
        ("ประเทศไทย", "กรุงเทพ"),
        ("값은 x\u200b", "y"),
    ],
)
def test_no_space_goes_inside_words_behind_what_opens_before_what_closes_and_in_scripts_without(before, after):
    assert space_between(before, after) == NONE


@pytest.mark.parametrize(
    ("before", "after"),
    [
        *[
            ("The x", start)
            for start in ("-based", "-", "—", "…", "...", "/", "_", "°C", "’", ".com", ":)", "\ufffd", "^")
        ],
        ("costs 5", "€"),
        ("10", "-5"),
        ("3.", "14"),
        ("10:", "30"),
        ("l'", "eau"),
        ("dell’", "arte"),
        ("2+2=", "4"),
        ("and/", "or"),
        ("R&", "B"),
        ("The x_", "y"),
        ("le groupe «", "Ilona"),
        ("in 2024", "年"),
        ("He lives in a city that is called 東", "because"),
        ('He said "yes', '" and'),
    ],
)
def test_where_writers_differ_no_space_is_put_and_that_is_said(before, after):
    assert space_between(before, after) == UNSURE
