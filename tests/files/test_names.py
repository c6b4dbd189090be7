import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttrace.files.names import RESERVED, is_plain, plain_name, plain_names

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=130)


@pytest.mark.parametrize("text", ["12", "P103", "oslo", "a b", "x" * 100, "1.5", "under_score", "console", "com10"])
def test_a_plain_name_stays_as_it_is(text):
    assert plain_name(text) == text


@pytest.mark.parametrize(
    "text", ["con", "NUL", "Aux", "com1", "LPT9", "prn.txt", "con.tar.gz", "nul .x", "aux ", "aux."]
)
def test_no_name_is_one_that_windows_keeps_for_a_device(text):
    assert plain_name(text).split(".")[0].strip().casefold() not in RESERVED


@pytest.mark.parametrize(
    "text", ["../x", "..", ".", "/etc", "C:\\x", "a/b", "a\\b", "-rf", "~", " x", "x ", "x.", "a\0b", ""]
)
def test_no_name_leads_elsewhere_is_hidden_or_looks_like_an_option(text):
    assert is_plain(plain_name(text))
    assert not is_plain(text)


@given(ANY_TEXT)
def test_every_text_has_a_plain_name(text):
    name = plain_name(text)
    assert is_plain(name)
    assert name not in (".", "..")
    assert os.path.basename(name) == name
    assert len(name.encode()) <= 113


@given(st.lists(ANY_TEXT, max_size=6))
def test_no_two_texts_have_one_name_even_where_capitals_do_not_count(texts):
    names = plain_names([*texts, *map(str.swapcase, texts)], taken=["Facts.csv"])
    assert len({name.casefold() for name in names.values()} - {"facts.csv"}) == len(names)
