# ruff: noqa: RUF001 (lookalikes are what some tests are about)

import csv
import json
import logging
import re
import unicodedata
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttrace.errors import PromptError, StoreError
from fasttrace.facts.dataset import BadRow, Fact, FactSet, check_answers, read_facts

FACTS = (
    Fact("tower", "The Space Needle is in the city of", "The Space Needle", "Seattle", "Boston", "city"),
    Fact("7", 'Tower "Big, Ben" is in', 'Tower "Big, Ben"', " London"),
    Fact("2", "東京タワーは\nどこ", "東京タワー"),
)
GOOD = {"prompt": "The Space Needle is in", "subject": "Space Needle", "target": "Seattle"}

ROME = [
    {
        "known_id": 40,
        "subject": "Mount Fuji",
        "attribute": "Japan",
        "template": "{} lies in",
        "prediction": " Japan, of course",
        "prompt": "Mount Fuji lies in",
        "relation_id": "P17",
    },
    {
        "known_id": 41,
        "subject": "Big Ben",
        "attribute": "London",
        "template": "{} lies in",
        "prediction": " London",
        "prompt": "Big Ben lies in",
        "relation_id": "P276",
    },
]

COUNTERFACT = [
    {
        "case_id": 0,
        "pararel_idx": 2796,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "relation_id": "P103",
            "target_new": {"str": "English", "id": "Q1860"},
            "target_true": {"str": "French", "id": "Q150"},
            "subject": "Victor Hugo",
        },
        "paraphrase_prompts": ["Victor Hugo spoke the language"],
    }
]


def write_json(path, values, **options):
    path.write_text(json.dumps(values, **options), encoding="utf-8")
    return path


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_rows(facts):
    return [asdict(fact) for fact in facts]


def bad_row(row):
    """The reason why a row is refused."""
    found = read_facts([GOOD, row])
    assert len(found) == 1
    assert [bad.line for bad in found.bad] == [2]
    return found.bad[0].reason


# Every format.


def test_the_same_facts_come_out_of_every_format(tmp_path):
    rows = as_rows(FACTS)
    frame = pd.DataFrame(rows)
    frame.to_parquet(tmp_path / "facts.parquet")
    sources = [
        write_json(tmp_path / "facts.json", rows, indent=1),
        write_lines(tmp_path / "facts.jsonl", *rows),
        write_csv(tmp_path / "facts.csv", rows),
        tmp_path / "facts.parquet",
        str(tmp_path / "facts.parquet"),
        frame,
        rows,
        FACTS,
        (row for row in rows),
    ]
    for source in sources:
        assert read_facts(source, strict=True).facts == FACTS


def test_a_set_has_a_length_and_gives_its_facts_in_order():
    found = FactSet("mine", FACTS)
    assert len(found) == 3
    assert tuple(found) == FACTS
    assert found.bad == ()


def test_a_set_is_named_after_its_file_or_its_type(tmp_path):
    assert read_facts(write_json(tmp_path / "my facts.JSON", ROME)).name == "my facts.JSON"
    assert read_facts([GOOD]).name == "list"
    assert read_facts(pd.DataFrame([GOOD])).name == "DataFrame"
    assert read_facts("builtin").name == "builtin"
    assert read_facts(FactSet("mine", FACTS)) == FactSet("mine", FACTS)


def test_romes_known_facts_are_read_with_their_ids_and_relations(tmp_path):
    assert read_facts(write_json(tmp_path / "known.json", ROME)).facts == (
        Fact("40", "Mount Fuji lies in", "Mount Fuji", "Japan", None, "P17", 0),
        Fact("41", "Big Ben lies in", "Big Ben", "London", None, "P276", 0),
    )


def test_counterfact_is_read_with_its_new_target_as_foil(tmp_path):
    expected = Fact("0", "The mother tongue of Victor Hugo is", "Victor Hugo", "French", "English", "P103", 21)
    pd.DataFrame(COUNTERFACT).to_parquet(tmp_path / "counterfact.parquet")
    path = write_json(tmp_path / "counterfact.json", COUNTERFACT)
    for source in (path, tmp_path / "counterfact.parquet", COUNTERFACT):
        assert read_facts(source).facts == (expected,)


def test_flat_copies_of_counterfact_are_read_too():
    row = {"prompt": "Big Ben is in", "subject": "Big Ben", "target_true": " London", "target_false": " Rome"}
    assert read_facts([row]).facts == (Fact("0", "Big Ben is in", "Big Ben", " London", " Rome"),)


class Dataset:
    """What read_facts sees of a Hugging Face Dataset."""

    def __init__(self, rows):
        self.rows, self.column_names = rows, list(rows[0])

    def __iter__(self):
        return iter(self.rows)


def test_hugging_face_datasets_are_read_and_their_columns_checked():
    assert read_facts(Dataset(ROME)).facts == read_facts(ROME).facts
    with pytest.raises(StoreError, match=r"Dataset has no column prompt, its columns are text, subject: expected"):
        read_facts(Dataset([{"text": "x", "subject": "x"}]))


def test_a_dataset_dict_asks_for_one_split():
    with pytest.raises(StoreError, match=r"found one dict with train, test: .*one split of a DatasetDict"):
        read_facts({"train": [GOOD], "test": [GOOD]})


@pytest.mark.parametrize("source", [None, 3, b"facts.json", FACTS[0]])
def test_what_is_no_source_is_refused(source):
    with pytest.raises(StoreError, match=f"found {type(source).__name__}: give 'builtin', the path of a file"):
        read_facts(source)


# Optional values.


def test_facts_without_id_are_named_by_the_number_of_their_row(tmp_path):
    rows = [{**GOOD, "id": None}, {"prompt": ""}, GOOD]
    assert [fact.id for fact in read_facts(rows)] == ["0", "2"]
    path = write_lines(tmp_path / "facts.jsonl", GOOD, "", {}, GOOD)
    assert [fact.id for fact in read_facts(path)] == ["0", "2"]


@pytest.mark.parametrize(
    ("given", "expected"), [("x y", "x y"), (12, "12"), (0, "0"), (3.0, "3"), (np.int64(4), "4"), (np.float32(5), "5")]
)
def test_ids_become_text(given, expected):
    assert read_facts([{**GOOD, "id": given}]).facts[0].id == expected


@pytest.mark.parametrize("null", [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT])
def test_null_in_any_way_is_none(null):
    row = {"prompt": "Big Ben is", "subject": "Big Ben"}
    names = ("id", "target", "attribute", "foil", "relation", "relation_id", "requested_rewrite")
    assert read_facts([row | dict.fromkeys(names, null)], strict=True).facts == (Fact("0", **row),)


def test_empty_cells_of_csv_and_missing_values_of_frames_are_none(tmp_path):
    path = write_lines(tmp_path / "facts.csv", "id,prompt,subject,target,foil", ",Big Ben is in,Big Ben,,")
    expected = Fact("0", "Big Ben is in", "Big Ben")
    assert read_facts(path, strict=True).facts == (expected,)
    frame = pd.DataFrame([{"id": 3, **GOOD, "foil": "Rome"}, {"id": np.nan, **GOOD}])
    assert [(fact.id, fact.foil) for fact in read_facts(frame, strict=True)] == [("3", "Rome"), ("1", None)]


def test_a_column_of_nulls_gives_way_to_one_of_the_same_meaning():
    row = {**GOOD, "target": None, "attribute": "Rome", "relation": None, "relation_id": "P19"}
    fact = read_facts([row]).facts[0]
    assert (fact.target, fact.relation) == ("Rome", "P19")


def test_texts_are_kept_as_they_are_written(tmp_path):
    row = {"prompt": " Big Ben is in ", "subject": " Big Ben", "target": " London", "relation": "a\tb"}
    path = write_lines(tmp_path / "facts.jsonl", row)
    assert read_facts(path).facts == (Fact("0", **row),)
    assert type(read_facts([{**GOOD, "target": np.str_("Rome")}]).facts[0].target) is str


# Columns of other names.


@pytest.mark.parametrize(
    "column",
    [
        *(
            "answer",
            "Answers",
            "ground_truth",
            "Ground Truth",
            "groundTruth",
            "object",
            "obj",
            "obj-label",
            "label",
            "o",
        ),
        *("Target", "TARGET", "target_str", "completion", "gold", "Target True", "Attribute"),
    ],
)
def test_answers_are_found_under_the_names_that_people_give_them(column, tmp_path):
    row = {"Prompt": "Big Ben is in", " SUBJECT": "Big Ben", column: "London"}
    pd.DataFrame([row]).to_parquet(tmp_path / "facts.parquet")
    for source in ([row], pd.DataFrame([row]), write_csv(tmp_path / "facts.csv", [row]), tmp_path / "facts.parquet"):
        assert read_facts(source, strict=True).facts == (Fact("0", "Big Ben is in", "Big Ben", "London"),)


@pytest.mark.parametrize("column", ["my answer", "response", "output", "expected_city", "answer_text", "target_city"])
def test_a_column_that_seems_to_hold_the_answers_is_refused_by_name(column, tmp_path):
    row = {"prompt": "Big Ben is in", "subject": "Big Ben", column: "London"}
    pd.DataFrame([row]).to_parquet(tmp_path / "facts.parquet")
    for source in ([row], write_csv(tmp_path / "facts.csv", [row]), tmp_path / "facts.parquet"):
        with pytest.raises(PromptError, match=f"its answer seems to be in {column}, .*call the one .* target"):
            read_facts(source)
    assert read_facts([{**row, "target": "Rome"}]).facts[0].target == "Rome"


@pytest.mark.parametrize("column", ["paraphrase_prompts", "sub_label", "is_correct", "obj_uri", "prediction", "note"])
def test_other_columns_are_ignored(column):
    assert read_facts([{"prompt": "Big Ben is in", "subject": "Big Ben", column: "x"}]).facts[0].target is None


def test_a_name_that_can_mean_other_things_is_told_once(caplog):
    rows = [{"prompt": "Big Ben is in", "subject": "Big Ben", "label": "London"}] * 3
    with caplog.at_level(logging.WARNING, "fasttrace"):
        read_facts(rows)
    assert caplog.messages == ["list: column label is taken for the answers; if it is something else, rename it"]


def test_of_two_columns_of_answers_the_first_of_the_documented_order_counts_and_that_is_told(caplog):
    with caplog.at_level(logging.WARNING, "fasttrace"):
        assert read_facts([{**GOOD, "answer": "Rome"}]).facts[0].target == "Seattle"
        assert read_facts([{**GOOD, "answer": "Seattle", "obj": None}]).facts[0].target == "Seattle"
    assert caplog.messages == ["list: the answers are those of column target, column answer has others"]


def test_two_spellings_of_one_column_that_differ_are_refused(tmp_path):
    assert "Target and target are one column by name and differ" in bad_row({"Target": "Rome", **GOOD})
    assert (
        read_facts([{"Target": "Seattle", **GOOD}, {"Target": None, **GOOD}], strict=True).facts[1].target == "Seattle"
    )
    path = write_csv(tmp_path / "facts.csv", [{"Target": "Rome", **GOOD}])
    with pytest.raises(StoreError, match="has 2 columns for one thing, Target and target: keep one of them"):
        read_facts(path)


def test_of_a_list_of_answers_the_first_is_taken_and_that_is_told(caplog):
    row = {"prompt": "Big Ben is in", "subject": "Big Ben"}
    with caplog.at_level(logging.WARNING, "fasttrace"):
        for answers in (["London"], ("London",), np.array(["London"], dtype=object), [None, "London"]):
            assert read_facts([{**row, "ground_truth": answers}]).facts[0].target == "London"
        assert caplog.messages == []
        fact = read_facts([{**row, "ground_truth": ["London", "Westminster"]}]).facts[0]
    assert fact.target == "London"
    assert fact.notes == ("ground_truth has 2 answers, of which the first is taken: 'London'",)
    assert caplog.messages == [f"list: taken otherwise than written, 1 times: row 1: {fact.notes[0]}"]
    assert read_facts([{**row, "answers": []}]).facts[0].target is None


def test_a_set_without_answers_is_refused_where_they_are_asked_for():
    check_answers(read_facts([GOOD]))
    nowhere = read_facts([{"prompt": "Big Ben is in", "subject": "Big Ben", "zielwort": "London"}])
    with pytest.raises(PromptError, match=r"its columns are prompt, subject, zielwort; rename the one .* to target"):
        check_answers(nowhere)
    with pytest.raises(PromptError, match=r"its columns are prompt, subject, zielwort; rename"):
        check_answers(read_facts(nowhere))


# Where the subject stands.


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("An art is in the category of artifacts and an", "art"),
        ("A cat is in the category of a", "cat"),
        ("artless art is", "art"),
        ("U.S. and U.S.A. are", "U.S."),
        ("C++11 or C++ is", "C++"),
        ("a_b a", "a"),
        ("x1 and x", "x"),
        ("Été étéx is", "Été"),
        ("ο Ζευς του Ζευσί", "Ζευς"),
    ],
)
def test_letters_inside_other_words_do_not_make_a_subject_ambiguous(prompt, subject):
    assert read_facts([{"prompt": prompt, "subject": subject}], strict=True).facts[0].notes == ()


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("Oslo and Oslo", "Oslo"),
        ("東京都と東京", "東京"),
        ("서울은 한국, 서울", "서울"),
        ("a.b a.b", "a.b"),
        ("C and C++", "C"),
    ],
)
def test_a_subject_that_stands_at_two_places_is_refused_and_told_how_to_say_which(prompt, subject):
    assert "occurs 2 times" in bad_row({"prompt": prompt, "subject": subject})
    assert "write {} in the prompt where it is meant" in bad_row({"prompt": prompt, "subject": subject})


def test_a_templates_place_is_the_subjects():
    rewrite = {"prompt": "{}, twin town of Oslo Gate, lies in", "subject": "Oslo", "target_true": {"str": "Norway"}}
    prompt = "Oslo, twin town of Oslo Gate, lies in"
    rows = [
        {"requested_rewrite": rewrite},
        {"template": rewrite["prompt"], "subject": "Oslo"},
        {"template": rewrite["prompt"], "prompt": prompt, "subject": "Oslo"},
        {"prompt": prompt, "subject": "Oslo", "subject_start": 0},
        {"prompt": rewrite["prompt"], "subject": "Oslo"},
    ]
    facts = read_facts(rows, strict=True).facts
    assert [(fact.prompt, fact.subject_start) for fact in facts] == [(prompt, 0)] * 5
    assert [len(fact.notes) for fact in facts] == [0, 0, 0, 0, 1]
    assert read_facts(facts, strict=True).facts[0].subject_start == 0
    second = {"requested_rewrite": {**rewrite, "prompt": "Oslo Gate, twin town of {}", "subject": " Oslo"}}
    (fact,) = read_facts([second])
    assert (fact.prompt[fact.subject_start :], fact.subject) == ("Oslo", " Oslo")


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
@pytest.mark.parametrize("text", ["Zoë Brün", "Ångström", "서울", "ﬁnland", "Ｏｓｌｏ", "Việt Nam", "New\u00a0York"])
def test_a_subject_in_another_unicode_form_is_found_and_that_is_noted(form, text):
    prompt, subject = f"{text} was born in", unicodedata.normalize(form, text)
    (fact,) = read_facts([{"prompt": prompt, "subject": subject}], strict=True)
    assert fact.subject == text
    assert len(fact.notes) == (subject != text)
    assert all("in another Unicode form (there " in note for note in fact.notes)


def test_both_forms_in_one_prompt_are_two_places():
    assert "occurs 2 times" in bad_row({"prompt": "Zo\u00eb and Zoe\u0308 are", "subject": "Zo\u00eb"})


def test_a_letter_is_not_cut_from_its_mark():
    decomposed = unicodedata.normalize("NFD", "Zoë and Zoe are")
    assert read_facts([{"prompt": decomposed, "subject": "Zoe"}], strict=True).facts[0].subject == "Zoe"
    assert "has a mark in the prompt" in read_facts([{"prompt": decomposed[:5], "subject": "Zoe"}]).facts[0].notes[0]


@pytest.mark.parametrize(
    ("prompt", "subject", "shown"),
    [
        ("oslo is", "Oslo", "but 'oslo' does (there 'o' U+006F, here 'O' U+004F)"),
        ("The Rock ’n’ Roll is", "Rock 'n' Roll", "but 'Rock ’n’ Roll' does (there '’' U+2019, here \"'\" U+0027)"),
        ("Jean–Luc is", "Jean-Luc", "but 'Jean–Luc' does (there '–' U+2013"),
        ("New  York is", "New York", "but 'New  York' does"),
        ("soft\u00adware is", "software", "but 'soft\\xadware' does"),
    ],
)
def test_what_looks_like_the_subject_is_shown_with_the_difference(prompt, subject, shown):
    assert shown in bad_row({"prompt": prompt, "subject": subject})


# Tables.


def test_tables_of_other_packages_are_read_as_pandas_tables_are(tmp_path):
    frame = pd.DataFrame([{**row, "ground_truth": "x"} for row in as_rows(FACTS)]).drop(columns=["notes"])
    table = pa.Table.from_pandas(frame)
    expected = read_facts(frame, strict=True).facts
    texts = frame[["prompt", "subject"]]
    records = texts.to_records(index=False)
    for source in (table, table.to_batches()[0], table.to_reader(), polars.from_arrow(table)):
        found = read_facts(source, strict=True)
        assert (found.facts, found.name) == (expected, type(source).__name__)
    for source in (
        texts.to_dict("list"),
        records,
        np.array(records.tolist(), dtype=[("prompt", "U99"), ("subject", "U99")]),
    ):
        assert [fact.prompt for fact in read_facts(source, strict=True)] == [fact.prompt for fact in FACTS]


def test_tables_are_held_to_the_columns_of_facts():
    for source in (pa.table({"a": ["x"]}), polars.DataFrame({"a": ["x"]}), np.array([(1,)], dtype=[("a", int)])):
        with pytest.raises(StoreError, match="has no column prompt and no column subject, its columns are a"):
            read_facts(source)
    with pytest.raises(StoreError, match=r"a LazyFrame, which is not computed yet: give LazyFrame.collect\(\)"):
        read_facts(polars.DataFrame([GOOD]).lazy())
    with pytest.raises(StoreError, match=r"differ in length \(prompt 1, subject 2\)"):
        read_facts({"prompt": ["a"], "subject": ["a", "b"]})
    with pytest.raises(StoreError, match="found one dict with prompt, subject, target: give a list"):
        read_facts(GOOD)
    assert len(read_facts(polars.DataFrame([GOOD]).to_struct(), strict=True)) == 1


# Malformed rows.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": None}, "prompt is missing: expected prompt and subject, found subject, target"),
        ({"prompt": " "}, "prompt is empty: expected text"),
        ({"prompt": 3}, "prompt is 3: expected text"),
        ({"prompt": [1, 2]}, r"prompt is \[1, 2\]: expected text"),
        ({"subject": None}, "subject is missing"),
        ({"subject": ""}, "subject is empty"),
        ({"subject": {"a": 1}}, "subject is {'a': 1}: expected text"),
        ({"subject": "space needle"}, "subject 'space needle' does not occur in prompt 'The Space Needle is in'"),
        ({"prompt": "a a", "subject": "a "}, "subject 'a' occurs 2 times in prompt 'a a': expected once"),
        ({"prompt": "aaa is", "subject": "aa"}, "subject 'aa' occurs 2 times"),
        ({"target": ""}, "target is empty"),
        ({"target": 1889}, "target is 1889: expected text; write a number in quotes"),
        ({"target": 1999.0}, "target is 1999.0: expected text; write a number in quotes"),
        ({"target": True}, "target is True: expected text"),
        ({"target": ["Rome"] * 50}, r"target is \['Rome', .*\.\.\.\]: expected text"),
        ({"foil": ""}, "foil is empty"),
        ({"foil": 2}, "foil is 2"),
        ({"relation": 103}, "relation is 103"),
        ({"target": "['Rome', 'Roma']"}, "target is .* a list written as text: write one answer there"),
        ({"subject_start": 3}, "subject 'Space Needle' does not stand at character 3 of 'The Space Needle is in'"),
        ({"subject_start": "x"}, "subject_start is 'x': expected the number of a character of the prompt"),
        ({"id": ""}, "id is empty"),
        ({"id": 1.5}, "id is 1.5: expected text or a whole number"),
        ({"id": float("inf")}, "id is inf: expected text or a whole number"),
        ({"id": False}, "id is False: expected text"),
        ({"target": "\ud800"}, r"target is '\\ud800', with half of a character"),
    ],
)
def test_a_malformed_row_is_skipped_with_its_reason(change, reason):
    assert re.match(reason, bad_row({**GOOD, **change}))
    with pytest.raises(PromptError, match=f"^list, row 2: .*{reason}"):
        read_facts([GOOD, {**GOOD, **change}], strict=True)


@pytest.mark.parametrize("row", ["a text", 3, None, [1], ["prompt", "subject"]])
def test_a_row_that_is_not_a_mapping_is_skipped(row):
    assert 'a fact must be a mapping with "prompt" and "subject"' in bad_row(row)


def test_a_fact_is_checked_like_any_row():
    assert "does not occur" in bad_row(Fact("x", "Big Ben is in", "Big Bill"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": "The mother tongue of"}, "has 0 places {} for the subject: expected 1"),
        ({"prompt": "{} and {}"}, "has 2 places {}"),
        ({"subject": None}, "subject is missing"),
        ({"prompt": 3}, "prompt is 3"),
        ({"target_true": {"str": ""}}, "target_true is empty"),
        ({"target_true": {"id": "Q1"}}, "target_true is {'id': 'Q1'}: expected text"),
        ({"target_new": {"str": 5}}, "target_new is 5: expected text"),
    ],
)
def test_a_malformed_rewrite_is_skipped_with_its_reason(change, reason):
    case = COUNTERFACT[0]
    assert reason in bad_row({**case, "requested_rewrite": {**case["requested_rewrite"], **change}})
    assert "requested_rewrite is a string, 'text'" in bad_row({**case, "requested_rewrite": "text"})


def test_the_second_of_two_equal_ids_is_skipped_and_the_first_one_named():
    rows = [{**GOOD, "id": 1}, GOOD, {**GOOD, "id": "1"}, {**GOOD, "id": "x"}, {**GOOD, "id": "x"}]
    found = read_facts(rows)
    assert [fact.id for fact in found] == ["1", "x"]
    assert [str(bad) for bad in found.bad] == [
        "row 2: id '1' is already that of row 1: ids have to be unique",
        "row 3: id '1' is already that of row 1: ids have to be unique",
        "row 5: id 'x' is already that of row 4: ids have to be unique",
    ]
    with pytest.raises(PromptError, match="row 2: id '1' is already that of row 1"):
        read_facts(rows, strict=True)


def test_a_bad_row_reads_as_its_place_and_its_reason():
    assert str(BadRow(3, "subject is empty")) == "line 3: subject is empty"
    assert str(BadRow(3, "subject is empty", "row")) == "row 3: subject is empty"
    assert str(BadRow(None, "subject is empty")) == "subject is empty"


def test_skipped_rows_are_logged_once_with_the_first_reasons(caplog):
    with caplog.at_level(logging.WARNING, "fasttrace"):
        read_facts([GOOD])
        assert caplog.messages == []
        read_facts([GOOD, *[{"prompt": 1}] * 5])
    (message,) = caplog.messages
    assert message.startswith("list: skipped 5 of 6 rows: row 2: prompt is 1: expected text; row 3")
    assert message.endswith("row 4: prompt is 1: expected text; and 2 more")


# Places.


def test_json_rows_are_placed_on_the_line_they_begin_on(tmp_path):
    path = tmp_path / "facts.json"
    good = json.dumps(GOOD)
    path.write_text(f'\n[\n  {good},\n  {{"prompt":\n    "a b"}}\n  , {good}, 5,\n\n  [],[{{}},\n1]]\n')
    assert [(bad.line, bad.unit) for bad in read_facts(path).bad] == [
        (4, "line"),
        (6, "line"),
        (8, "line"),
        (8, "line"),
    ]


def test_json_rows_on_one_line_are_counted_as_entries(tmp_path):
    path = write_json(tmp_path / "facts.json", [GOOD, {}, GOOD, 3])
    assert [(bad.line, bad.unit) for bad in read_facts(path).bad] == [(2, "entry"), (4, "entry")]
    with pytest.raises(PromptError, match=r"facts.json, entry 2: prompt is missing: .*found nothing; correct it"):
        read_facts(path, strict=True)


def test_json_lines_are_counted_with_the_empty_ones(tmp_path):
    path = write_lines(tmp_path / "facts.jsonl", GOOD, "", "{", "   ", {"prompt": "a"}, GOOD, "[1", "")
    found = read_facts(path)
    assert [bad.line for bad in found.bad] == [3, 5, 7]
    assert "it is not JSON (Expecting property name" in found.bad[0].reason
    assert len(found) == 2


def test_other_line_ends_within_a_json_line_do_not_end_it(tmp_path):
    row = {"prompt": "Big\u2028Ben\x85is in", "subject": "Big\u2028Ben"}
    path = write_lines(tmp_path / "facts.jsonl", json.dumps(row, ensure_ascii=False), "{}")
    found = read_facts(path)
    assert found.facts == (Fact("0", **row),)
    assert [bad.line for bad in found.bad] == [2]


def test_csv_rows_are_placed_on_the_line_they_begin_on(tmp_path):
    path = write_lines(
        tmp_path / "facts.csv",
        "prompt, subject ,target",
        '"Big Ben',
        'is in",Big Ben,London',
        "",
        "Big Ben is in,Big Bill,London",
        "Big Ben, in London, is in,Big Ben,London",
        "Big Ben",
        '"Big Ben" is in,Big Ben,London',
        "Big Ben is in,Big Ben,London",
        '"Big Ben is in,Big Ben,London',
        "Big Ben is in,Big Ben,London",
    )
    found = read_facts(path)
    assert [fact.prompt for fact in found] == ["Big Ben\nis in", "Big Ben is in"]
    assert [bad.line for bad in found.bad] == [5, 6, 7, 8, 10]
    reasons = [bad.reason for bad in found.bad]
    assert reasons[1] == "it has 5 cells for 3 columns: put text that holds a comma into quotes"
    assert reasons[2].startswith("it has 1 cells for 3 columns")
    assert reasons[3].startswith("it is not CSV (")
    assert reasons[4].startswith("it is not CSV (")


def test_parquet_and_frames_count_rows(tmp_path):
    frame = pd.DataFrame([GOOD, {**GOOD, "subject": "x"}], index=[10, 20])
    frame.to_parquet(tmp_path / "facts.parquet")
    for source in (frame, tmp_path / "facts.parquet"):
        assert [(bad.line, bad.unit) for bad in read_facts(source).bad] == [(2, "row")]


# Strict and limit.


def test_strict_stops_at_the_first_malformed_row_with_line_and_reason(tmp_path):
    path = write_lines(tmp_path / "facts.jsonl", GOOD, {**GOOD, "subject": "Tower"}, "{")
    with pytest.raises(PromptError, match=r"facts.jsonl, line 2: subject 'Tower' does not occur .* without strict"):
        read_facts(path, strict=True)
    with pytest.raises(PromptError, match="line 1: it is not JSON"):
        read_facts(write_lines(tmp_path / "bad.jsonl", "{", GOOD), strict=True)


def test_a_limit_counts_facts_and_leaves_the_rest_unread():
    def rows():
        yield {}
        yield GOOD
        yield GOOD
        raise AssertionError("read too far")

    found = read_facts(rows(), limit=2)
    assert [fact.id for fact in found] == ["1", "2"]
    assert len(found.bad) == 1
    assert len(read_facts([GOOD], limit=5)) == 1
    assert read_facts([GOOD, {}], limit=1, strict=True).bad == ()


def test_the_subjects_behind_a_limit_are_known_where_the_source_is_there_as_a_whole(tmp_path):
    rows = [{"id": str(n), "prompt": f"Fact {n} is in", "subject": f"Fact {n}"} for n in range(4)]
    bad = [{"prompt": "no subject"}, rows[1]]
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([*rows[:2], *bad, *rows[2:]]))
    everything = read_facts(path)
    assert everything.subjects == ("Fact 0", "Fact 1", "Fact 2", "Fact 3")
    for source in (path, json.loads(path.read_text()), pd.DataFrame(rows), everything):
        found = read_facts(source, limit=1, strict=True)
        assert (len(found), found.bad, found.subjects) == (1, (), everything.subjects)
        assert read_facts(found).subjects == everything.subjects
    assert read_facts(iter(rows), limit=1).subjects == ("Fact 0",)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(PromptError, match=f"limit is {limit}: give at least 1"):
        read_facts([GOOD], limit=limit)


# Files that are none, or written by other programs.


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_byte_order_marks_and_windows_line_ends_are_accepted(tmp_path, mark, line_end):
    rows = as_rows(FACTS[:2])
    (tmp_path / "a.json").write_bytes((mark + json.dumps(rows, indent=1).replace("\n", line_end)).encode())
    (tmp_path / "a.jsonl").write_bytes((mark + line_end.join(map(json.dumps, rows)) + line_end).encode())
    content = write_csv(tmp_path / "a.csv", rows).read_text(encoding="utf-8")
    (tmp_path / "a.csv").write_bytes((mark + line_end.join(content.splitlines())).encode())
    for name in ("a.json", "a.jsonl", "a.csv"):
        found = read_facts(tmp_path / name, strict=True)
        assert found.facts == FACTS[:2]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_another_encoding_is_refused_with_its_line(tmp_path, suffix):
    path = tmp_path / f"facts{suffix}"
    path.write_bytes("prompt\ncaf\u00e9".encode("latin-1"))
    with pytest.raises(StoreError, match=r"is not UTF-8 text \(byte 0xe9 on line 2\): save it as UTF-8"):
        read_facts(path)
    path.write_bytes("prompt".encode("utf-16"))
    with pytest.raises(StoreError, match="is not UTF-8 text"):
        read_facts(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", r"is not JSON \(line 1, column 1: Expecting value"),
        ("prompt,subject", r"is not JSON \(line 1, column 1"),
        ("[{}\n, ", r"is not JSON \(line 2, column 3: Expecting value"),
        ("[{},\n]", r"is not JSON \(line \d, column \d: (Expecting value|Illegal trailing)"),  # of Python 3.13
        ("[{}\n{}]", r"is not JSON \(line 2, column 1: Expecting ',' delimiter"),
        ("[{}", r"is not JSON \(line 1, column 4: Expecting ',' delimiter"),
        ("[", r"is not JSON \(line 1, column 2: Expecting value"),
        ("[{}] []", r"is not JSON \(line 1, column 6: Extra data"),
        ('{"prompt": 1}\n{"prompt": 2}', r"is not JSON \(line 2, .* one fact per line ends in .jsonl"),
        ('{"prompt": "a b"}', "holds one JSON dict: expected a list of facts"),
        ('"text"', "holds one JSON str: expected a list of facts"),
        ("[" * 100_000, "is not readable JSON"),
        ("[1" + "0" * 5000 + "]", "is not readable JSON"),
    ],
)
def test_a_file_that_is_no_json_list_is_refused_with_its_place(tmp_path, content, reason):
    path = tmp_path / "facts.json"
    path.write_text(content)
    with pytest.raises(StoreError, match=f"facts.json {reason}"):
        read_facts(path)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("id,text,subject", "has no column prompt, its columns are id, text, subject: expected prompt, subject and"),
        ("a,b", "has no column prompt and no column subject, its columns are a, b"),
        ("prompt;subject;target", ".*its columns are prompt;subject;target: .*separate them by commas"),
        ("prompt,subject,target,target", "has 2 columns called target: keep one"),
    ],
)
def test_wrong_columns_are_refused_with_those_found(tmp_path, header, reason):
    path = write_lines(tmp_path / "facts.csv", header, "x")
    with pytest.raises(StoreError, match=f"facts.csv {reason}"):
        read_facts(path)
    if "called" not in reason:
        frame = pd.DataFrame([["x"] * len(header.split(","))], columns=header.split(","))
        frame.to_parquet(tmp_path / "facts.parquet")
        for source in (frame, tmp_path / "facts.parquet"):
            with pytest.raises(StoreError, match=reason):
                read_facts(source)


def test_a_frame_with_a_column_twice_is_refused():
    with pytest.raises(StoreError, match="DataFrame has 2 columns called prompt"):
        read_facts(pd.DataFrame([["a", "a", "b"]], columns=["prompt", "prompt", "subject"]))


def test_a_source_without_facts_is_refused(tmp_path):
    empty = {"a.json": "[ ]", "a.jsonl": "\n", "a.csv": "prompt,subject\n"}
    for name, content in empty.items():
        (tmp_path / name).write_text(content)
    frame = pd.DataFrame([GOOD])[:0]
    frame.to_parquet(tmp_path / "a.parquet")
    for source in (*(tmp_path / name for name in empty), tmp_path / "a.parquet", frame, [], iter(())):
        with pytest.raises(PromptError, match=r"no facts in .*: it is empty; give at least one usable row"):
            read_facts(source)
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(StoreError, match="is empty: expected a line with the columns"):
        read_facts(tmp_path / "a.csv")


def test_a_source_of_malformed_rows_alone_is_refused_with_the_first_reasons(tmp_path):
    path = write_lines(tmp_path / "facts.jsonl", *[{"text": "a", "entity": "b"}] * 4)
    with pytest.raises(PromptError, match=r"no facts in .*line 1: prompt is missing: .*found text, entity; .*1 more"):
        read_facts(path)


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    path = tmp_path / "facts.parquet"
    pd.DataFrame([GOOD] * 100).to_parquet(path)
    for content in (b"", b"text", path.read_bytes()[:-50]):
        path.write_bytes(content)
        with pytest.raises(StoreError, match="is not a readable parquet file"):
            read_facts(path)


def test_a_wrong_path_is_named(tmp_path):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(StoreError, match=r"nothing at .*no.json: expected a file of facts"):
        read_facts(tmp_path / "no.json")
    with pytest.raises(StoreError, match="a folder at"):
        read_facts(str(tmp_path / "folder.json"))
    with pytest.raises(StoreError, match=r"facts.txt ends in '.txt': facts are read from .json, .jsonl, .csv, .parq"):
        read_facts("facts.txt")
    with pytest.raises(StoreError, match=r"bultin ends in ''.*or 'builtin'"):
        read_facts("bultin")


# Anything that can be written comes back.

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5).filter(str.strip)
MAYBE_TEXT = st.none() | ANY_TEXT


@given(st.lists(st.tuples(ANY_TEXT, MAYBE_TEXT, MAYBE_TEXT, MAYBE_TEXT), min_size=1, max_size=3))
def test_any_unicode_survives_every_format(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("facts")
    texts = [(f"<{subject}>", f"<{subject}>", *rest) for subject, *rest in drawn]
    facts = tuple(Fact(str(number), *fields) for number, fields in enumerate(texts))
    rows = as_rows(facts)
    pd.DataFrame(rows).to_parquet(folder / "a.parquet")
    write_csv(folder / "a.csv", rows)
    write_json(folder / "a.json", rows, ensure_ascii=False, indent=1)
    write_lines(folder / "a.jsonl", *(json.dumps(row, ensure_ascii=False) for row in rows))
    for suffix in ("parquet", "csv", "json", "jsonl"):
        found = read_facts(Path(folder) / f"a.{suffix}", strict=True)
        assert found.facts == facts


# The set that comes with fasttrace.


def test_the_builtin_set_has_no_bad_row_and_several_relations():
    found = read_facts("builtin", strict=True)
    assert len(found) >= 60
    relations = [fact.relation for fact in found]
    assert len(set(relations)) >= 6
    assert min(relations.count(relation) for relation in relations) >= 4


def test_every_builtin_fact_can_be_traced_and_has_an_answer_and_a_foil():
    for fact in read_facts("builtin"):
        assert fact.target
        assert fact.foil
        assert fact.foil.split()[0] != fact.target.split()[0], fact.id
        assert fact.target not in fact.prompt, fact.id
        assert not fact.prompt.endswith((fact.subject, " ")), fact.id


def test_builtin_ids_are_words_joined_by_hyphens():
    for fact in read_facts("builtin"):
        assert fact.id == fact.id.lower()
        assert fact.id.replace("-", "").isalnum()
    assert read_facts("builtin", limit=3).facts == read_facts("builtin").facts[:3]
