import dataclasses
import errno
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fasttrace.errors import StoreError
from fasttrace.facts.dataset import Fact
from fasttrace.files import writing as files
from fasttrace.files.writing import write_new
from fasttrace.results.record import Record
from fasttrace.runs import store as stores
from fasttrace.runs.manifest import STORE_VERSION
from fasttrace.runs.parts import FACT_COLUMNS, encode_part, part_name
from fasttrace.runs.store import Store
from tests.helpers.records import FINGERPRINT, STREAMS, fact, flip, make_result, new_store, result_of, skipped, traced


def ids(store):
    return [record.fact.id for record in store.records()]


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# What is written is what is read.


def test_records_come_back_equal_whichever_store_reads_them(tmp_path):
    store = new_store(tmp_path)
    written = [traced(1), skipped(2), traced(3)]
    store.write(written)
    for reader in (store, Store.read(tmp_path / "run"), Store.open(tmp_path / "run", FINGERPRINT)):
        assert list(reader.records()) == written
        assert reader.done == {"1", "2", "3"}
        assert reader.damaged == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": ("\ud83d", "\udc00 b", "?", "", "\0", "\n", " 東京")},
        {"target": "\udfff"},
        {"target": None},
        {"prob": {"block_output": np.full((5, 7), math.nan)}, "prob_std": {"block_output": np.full((5, 7), -0.0)}},
        {"clean_prob": math.nan, "corrupted_std": math.inf, "corrupted_prob": -0.0},
        {"metadata": {"nested": [1, 2.5, None, {"x": "\ud800"}], "nan": math.nan}},
        {"top": {"clean": (), "corrupted": ((1, "\ud800", 5e-324),)}},
    ],
)
def test_odd_values_come_back_bit_for_bit(tmp_path, changes):
    store = new_store(tmp_path)
    store.write([traced(0), traced(1, **changes), skipped(2)])
    assert list(Store.read(store.folder).records()) == [traced(0), traced(1, **changes), skipped(2)]


def test_texts_that_are_not_unicode_survive_in_a_fact_and_a_reason(tmp_path):
    odd = Record(fact(1, prompt="a \ud800", subject="\ud800", target="\udfff", relation="é"), reason="no \ud800")
    new_store(tmp_path).write([odd])
    store = Store.read(tmp_path / "run")
    assert list(store.records()) == [odd]
    assert store.facts().prompt.tolist() == ["a ?"]


def test_every_field_that_facts_are_compared_by_is_stored():
    compared = {field.name for field in dataclasses.fields(Fact) if field.compare}
    assert compared == {*FACT_COLUMNS, "subject_start"}  # which is kept in `details`


def test_facts_are_ordered_by_the_numbers_in_their_ids_whatever_the_order_of_writing(tmp_path):
    store = new_store(tmp_path)
    names = ["10", "9", "a2", "a10", "a1b3", "", "009", "é", "9" * 5000]
    random.Random(0).shuffle(names)
    for name in names:
        store.write([skipped(name)])
    assert ids(store) == ["", "009", "9", "10", "9" * 5000, "a1b3", "a2", "a10", "é"]


def test_a_fact_in_two_parts_counts_once_and_the_first_part_is_taken(tmp_path):
    store = new_store(tmp_path)
    store.write([traced(2), traced(1)], rank=1)
    store.write([Record(fact(1), reason="other"), traced(3)], rank=0)
    assert ids(store) == ["1", "2", "3"]
    assert next(store.records()).reason == "other"
    assert store.facts()[["id", "status"]].values.tolist() == [["1", "skipped"], ["2", "traced"], ["3", "traced"]]
    assert store.frame().groupby("fact").size().to_dict() == {"2": 105, "3": 105}


def test_a_fact_twice_in_one_part_counts_once(tmp_path):
    store = new_store(tmp_path)
    store.write([skipped(1), traced(1)])
    assert list(store.records()) == [skipped(1)]
    assert len(store.facts()) == 1


def test_records_of_many_parts_are_given_in_order_with_few_parts_in_memory(tmp_path):
    store = new_store(tmp_path)
    for start in range(40):
        store.write([skipped(start), skipped(start + 40)])
    assert ids(store) == [str(number) for number in range(80)]


@pytest.mark.parametrize("record", [Record(fact(1)), Record(fact(1), make_result(), "why")])
def test_a_record_is_either_traced_or_skipped(tmp_path, record):
    with pytest.raises(StoreError, match=r"fact '1' has .*: give one of the two"):
        new_store(tmp_path).write([record])


def test_nothing_is_no_part_and_an_id_has_to_be_text(tmp_path):
    store = new_store(tmp_path)
    with pytest.raises(StoreError, match="no records to write"):
        store.write([])
    with pytest.raises(StoreError, match="not valid Unicode"):
        store.write([skipped("\ud800")])
    assert store.done == frozenset()


# The tables.


def test_the_facts_have_a_row_each_with_missing_values_where_one_was_skipped(tmp_path):
    store = new_store(tmp_path)
    store.write([traced(1), skipped(2)])
    facts = store.facts()
    first, second = facts.to_dict("records")
    assert (first["status"], first["correct"], first["clean_prob"]) == ("traced", True, 0.97638)
    assert first["total_effect"] == 0.97638 - 0.026176
    assert (first["n_layers"], first["n_positions"], first["span_start"], first["span_stop"]) == (5, 7, 0, 4)
    assert (first["target_token"], first["target_id"]) == (" Seattle", 7312)
    assert (second["status"], second["reason"], second["relation"]) == ("skipped", "no subject", "P17")
    assert pd.isna(second["correct"])
    assert pd.isna(second["clean_prob"])
    assert facts.correct.dtype == "boolean"
    assert facts.target_id.dtype == "Int64"


def test_an_empty_store_has_empty_tables(tmp_path):
    store = new_store(tmp_path)
    assert len(store.facts()) == len(store.frame()) == len(list(store.records())) == 0
    store.write([traced(1), skipped(2)])
    filled = Store.read(store.folder)
    assert list(filled.facts().columns) == list(new_store(tmp_path / "other").facts().columns)
    assert list(filled.frame().columns) == list(new_store(tmp_path / "other").frame().columns)


def test_the_frame_has_the_cells_of_every_result(tmp_path):
    store = new_store(tmp_path)
    store.write([traced(11), skipped(1), traced(2)])
    frame = store.frame()
    assert frame.fact.unique().tolist() == ["2", "11"]
    pd.testing.assert_frame_equal(frame.query("fact == '2'").drop(columns="fact"), result_of(2).to_frame())


def test_pandas_reads_the_whole_folder_of_parts_also_when_the_first_has_no_traces(tmp_path):
    store = new_store(tmp_path)
    store.write([skipped(1)], rank=0)
    store.write([traced(2)], rank=1)
    table = pd.read_parquet(store.folder / "parts")
    row = table[table.id == "2"].iloc[0]
    grid = row.prob_mlp_activation.reshape(int(row.n_layers), int(row.n_positions))
    np.testing.assert_array_equal(grid, result_of(2).grid("mlp_activation"))
    assert row.tokens.tolist() == list(result_of(2).tokens)
    metrics = {"metrics", "target_ids", "foil_ids"}
    assert set(json.loads(row.details)) == {"streams", "top", "windows", "metadata", "cost", "exact", *metrics}


def test_the_facts_of_rome_on_the_largest_gpt2_take_less_than_a_hundred_megabytes(tmp_path):
    shape = (48, 11)
    draws = np.random.default_rng(0)
    size = {"tokens": tuple("abcdefghijk"), "token_ids": tuple(range(11))}
    grids = [{name: {s: draws.random(shape) for s in STREAMS} for name in ("prob", "prob_std")} for _ in range(10)]
    part = new_store(tmp_path).write([Record(fact(i), make_result(**size, **grid)) for i, grid in enumerate(grids)])
    assert part.stat().st_size * 1209 / 10 < 60e6


# Damage.


def store_with_a_part(tmp_path):
    store = new_store(tmp_path)
    store.write([traced(1)])
    damaged = store.write([traced(2), skipped(3)])
    return store, damaged, damaged.read_bytes()


def check_is_set_aside(folder, part):
    assert Store.read(folder).damaged == (part,)
    assert Store.read(folder).done == {"1"}
    store = Store.open(folder, FINGERPRINT)
    assert store.done == {"1"}
    assert ids(store) == store.facts().id.tolist() == ["1"]
    assert not part.exists()
    assert (folder / "damaged" / part.name).exists()


@pytest.mark.parametrize("kept", [0, 1, 0.5, 0.999, -1])
def test_a_torn_part_is_set_aside_and_its_facts_are_not_done(tmp_path, kept):
    store, part, content = store_with_a_part(tmp_path)
    part.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    check_is_set_aside(store.folder, part)


@pytest.mark.parametrize("content", [b"PAR1PAR1", b"\0" * 4096])
def test_a_part_of_other_content_is_set_aside(tmp_path, content):
    store, part, _ = store_with_a_part(tmp_path)
    part.write_bytes(content)
    check_is_set_aside(store.folder, part)


def test_a_part_with_bytes_added_is_set_aside(tmp_path):
    store, part, content = store_with_a_part(tmp_path)
    part.write_bytes(content + b"\0")
    check_is_set_aside(store.folder, part)


def test_one_flipped_bit_is_found_wherever_it_is(tmp_path):
    store, part, content = store_with_a_part(tmp_path)
    draws = random.Random(0)
    footer = range(len(content) - 40, len(content))
    offsets = [*range(40), *footer, *draws.sample(range(len(content)), 120)]
    for offset in offsets:
        flip(part, offset, draws.randrange(8))
        assert Store.read(store.folder).damaged == (part,), offset
        part.write_bytes(content)
    assert Store.read(store.folder).done == {"1", "2", "3"}


def test_the_facts_of_a_damaged_part_are_written_again_and_it_is_kept_aside(tmp_path):
    store, part, content = store_with_a_part(tmp_path)
    flip(part, 1000)
    again = Store.open(store.folder, FINGERPRINT)
    again.write([traced(2), skipped(3)])
    assert list(Store.read(store.folder).records()) == [traced(1), traced(2), skipped(3)]
    assert len(list((store.folder / "damaged").iterdir())) == 1
    part.write_bytes(content[:-1])
    moved = again.check()
    assert len(moved) == 1
    assert len(list((store.folder / "damaged").iterdir())) == 2
    assert again.done == {"1", "2", "3"}


def test_check_finds_what_was_damaged_after_the_store_was_opened(tmp_path):
    store, part, _ = store_with_a_part(tmp_path)
    assert store.check() == ()
    flip(part, 5)
    with pytest.raises(StoreError, match="cut short or damaged"):
        list(store.records())
    assert store.check() == (store.folder / "damaged" / part.name,)
    assert ids(store) == ["1"]


def test_a_part_that_was_renamed_is_set_aside(tmp_path):
    store, part, _ = store_with_a_part(tmp_path)
    part.rename(part.with_name("mine.parquet"))
    check_is_set_aside(store.folder, part.with_name("mine.parquet"))


def test_a_part_that_another_process_has_set_aside_meanwhile_is_no_error(tmp_path, monkeypatch):
    store, part, _ = store_with_a_part(tmp_path)
    flip(part, 5)
    monkeypatch.setattr(files.os, "replace", lambda old, _new: old.unlink() or old.stat())
    assert store.check() == ()


def test_a_part_that_appears_while_the_folder_is_checked_is_left_alone(tmp_path, monkeypatch):
    store, part, _ = store_with_a_part(tmp_path)
    flip(part, 5)
    read = stores.read_part

    def read_while_another_writes(path, columns):
        monkeypatch.setattr(stores, "read_part", read)
        Store(store.folder, {"fingerprint": FINGERPRINT, "facts": {}}, FINGERPRINT).write([skipped(9)])
        return read(path, columns)

    monkeypatch.setattr(stores, "read_part", read_while_another_writes)
    assert [path.name for path in store.check()] == [part.name]
    assert store.done == {"1", "9"}


def test_reading_changes_nothing_and_cannot_write(tmp_path):
    store, part, _ = store_with_a_part(tmp_path)
    flip(part, 5)
    before = everything_in(store.folder)
    reader = Store.read(store.folder)
    assert reader.done == {"1"}
    for call in (reader.check, lambda: reader.write([skipped(9)]), lambda: reader.describe("x", 1)):
        with pytest.raises(StoreError, match="open for reading only"):
            call()
    assert everything_in(store.folder) == before


def test_parts_of_another_run_are_refused_and_left_where_they_are(tmp_path):
    store, part, _ = store_with_a_part(tmp_path)
    other = Store.open(tmp_path / "other", FINGERPRINT | {"samples": 3})
    copy = Path(shutil.copy(part, other.folder / "parts"))
    for use in (lambda: other.done, other.check, lambda: Store.open(other.folder, FINGERPRINT | {"samples": 3})):
        with pytest.raises(StoreError, match=rf"{part.name} holds another run \(samples 10 there, 3 here\)"):
            use()
    assert copy.exists()
    assert store.done == {"1", "2", "3"}


def test_a_part_of_a_newer_format_is_refused_and_left_where_it_is(tmp_path, monkeypatch):
    store, _, _ = store_with_a_part(tmp_path)
    monkeypatch.setattr("fasttrace.runs.parts.STORE_VERSION", STORE_VERSION + 1)
    content = encode_part([skipped(7)], (), FINGERPRINT)
    monkeypatch.undo()
    newer = store.folder / "parts" / part_name(content, 0, 0)
    newer.write_bytes(content)
    with pytest.raises(StoreError, match=f"format version {STORE_VERSION + 1}.*upgrade fasttrace"):
        Store.open(store.folder, FINGERPRINT)
    assert newer.exists()


# The manifest.


def test_the_manifest_is_readable_json_with_what_the_run_was_asked_for(tmp_path):
    store = new_store(tmp_path)
    store.describe("known_1000", 1209, [{"row": 3, "problem": "no subject"}])
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert manifest["fingerprint"] == json.loads(json.dumps(FINGERPRINT))
    assert manifest["format_version"] == STORE_VERSION
    assert Store.read(store.folder).description == manifest["facts"]
    assert manifest["facts"]["bad_rows"] == [{"row": 3, "problem": "no subject"}]
    assert Store.open(store.folder, FINGERPRINT).description["n_facts"] == 1209


def test_describing_a_run_differently_is_no_other_run(tmp_path):
    store = new_store(tmp_path)
    store.describe("known_1000", 10)
    again = new_store(tmp_path)
    again.describe("known_1000", 1209)
    assert Store.read(store.folder).description == {"name": "known_1000", "n_facts": 1209, "bad_rows": []}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.15}, r"sigma 0.13462981581687927 there, 0.15 here"),
        ({"windows": {"mlp_activation": 5}}, r"windows.mlp_activation 10 there, 5 here"),
        ({"windows": {"mlp_activation": 10}}, r"windows.attention_output 10 there, nothing here"),
        ({"metric": "logit_diff"}, r"metric nothing there, 'logit_diff' here"),
        ({"streams": ["block_output"]}, r"streams \['block_output', .*\] there, \['block_output'\] here"),
    ],
)
def test_another_run_is_refused_with_what_differs(tmp_path, change, message):
    store, _, _ = store_with_a_part(tmp_path)
    before = everything_in(store.folder)
    with pytest.raises(StoreError, match=message):
        Store.open(store.folder, FINGERPRINT | change)
    assert everything_in(store.folder) == before


def test_all_differences_are_listed_at_once(tmp_path):
    new_store(tmp_path)
    with pytest.raises(StoreError, match="samples 10 there, 3 here; seed nothing there, 2 here"):
        Store.open(tmp_path / "run", FINGERPRINT | {"samples": 3, "seed": 2})


def test_other_versions_are_noted_and_a_sigma_may_move_in_its_last_digits(tmp_path):
    assert new_store(tmp_path).notes == ()
    moved = FINGERPRINT | {"sigma": FINGERPRINT["sigma"] * (1 + 5e-7), "versions": {"torch": "2.8.0", "cuda": "13"}}
    store = Store.open(tmp_path / "run", moved)
    assert store.notes == ("torch '2.7.0' there, '2.8.0' here", "cuda nothing there, '13' here")
    assert Store.open(tmp_path / "run", FINGERPRINT | {"model": "gpt2"}).notes == (
        "model 'gpt2-xl' there, 'gpt2' here",
    )
    assert store.fingerprint["sigma"] == FINGERPRINT["sigma"]
    store.write([skipped(1)])
    assert new_store(tmp_path).done == {"1"}


def test_a_fingerprint_of_numpy_numbers_and_tuples_is_the_same_as_a_plain_one(tmp_path):
    new_store(tmp_path)
    Store.open(tmp_path / "run", FINGERPRINT | {"samples": np.int64(10), "streams": list(STREAMS)})
    with pytest.raises(StoreError, match="fingerprint is to be stored as JSON"):
        Store.open(tmp_path / "other", {"dtype": object()})


@pytest.mark.parametrize(("old", "new"), [('"samples": 10', '"samples": 11'), ("2.7.0", "2.7.1"), ('"sum', '"Sum')])
def test_an_edited_manifest_is_refused(tmp_path, old, new):
    path = new_store(tmp_path).folder / "manifest.json"
    text = path.read_text().replace('"checksum"', '"sum"') if old == '"sum' else path.read_text()
    path.write_text(text.replace(old, new))
    for use in (lambda: new_store(tmp_path), lambda: Store.read(tmp_path / "run")):
        with pytest.raises(StoreError, match="was edited or damaged"):
            use()


def test_a_manifest_that_was_only_laid_out_differently_is_the_same(tmp_path):
    path = new_store(tmp_path).folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert new_store(tmp_path).done == frozenset()


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff\xfe", "null"])
def test_something_else_named_like_a_manifest_is_refused(tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError, match="no manifest of fasttrace, or a damaged one"):
        new_store(tmp_path)


def test_a_store_of_a_newer_format_is_refused_with_the_advice_to_upgrade(tmp_path):
    path = new_store(tmp_path).folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(StoreError, match=rf"format version 99, this fasttrace reads up to {STORE_VERSION}: upgrade"):
        new_store(tmp_path)


def test_a_lost_manifest_is_made_again_by_the_same_run_and_by_no_other(tmp_path):
    store, _, _ = store_with_a_part(tmp_path)
    (store.folder / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"holds another run \(sigma 0.13\d* there, 0.15 here\)"):
        Store.open(store.folder, FINGERPRINT | {"sigma": 0.15})
    assert not (store.folder / "manifest.json").exists()
    assert new_store(tmp_path).done == {"1", "2", "3"}


def test_a_folder_without_a_store_cannot_be_read(tmp_path):
    with pytest.raises(StoreError, match=r"no manifest.json at .*: expected a folder written by"):
        Store.read(tmp_path)
    with pytest.raises(StoreError, match="no folder at"):
        Store.read(tmp_path / "nowhere")


def test_facts_that_are_done_are_not_among_the_remaining(tmp_path):
    store = new_store(tmp_path)
    store.write([skipped(1), traced(3)])
    assert store.remaining([fact(3), fact(2), skipped(1).fact, fact(4)]) == [fact(2), fact(4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "Another"}, "prompt 'Fact 1 is in' there, 'Another' here"),
        ({"target": "Paris"}, "target None there, 'Paris' here"),
    ],
)
def test_another_fact_under_the_id_of_one_that_is_done_is_refused(tmp_path, change, message):
    store = new_store(tmp_path)
    store.write([traced(1), skipped(2)])
    with pytest.raises(StoreError, match=rf"the store has another fact '1' \({message}\)"):
        store.remaining([fact(1, **change)])
    with pytest.raises(StoreError, match="target 'Paris' there, None here"):
        store.remaining([fact(2)])


# Folders that cannot be used, full disks, what killed processes leave.


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(StoreError, match="run"):
        new_store(tmp_path)
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to root")
@pytest.mark.parametrize("made_before", [False, True])
def test_a_folder_without_permission_to_write_is_refused(tmp_path, made_before):
    folder = tmp_path / "run"
    new_store(tmp_path) if made_before else folder.mkdir()
    folder.chmod(0o500)
    try:
        with pytest.raises(StoreError, match=r"(cannot be written to|cannot write).*folder"):
            new_store(tmp_path)
    finally:
        folder.chmod(0o700)


def no_space(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def half(path, content):
    with path.open("wb") as file:
        file.write(content[: len(content) // 2])
    no_space()


@pytest.mark.parametrize(
    ("owner", "name", "fails"),
    [(Path, "write_bytes", half), (files.os, "fsync", no_space), (files.os, "replace", no_space)],
)
def test_a_full_disk_leaves_nothing_half_written_and_the_run_can_go_on(tmp_path, monkeypatch, owner, name, fails):
    store = new_store(tmp_path)
    store.write([traced(1)])
    before = everything_in(store.folder)
    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(StoreError, match=r"No space left on device.*start the same run again: it goes on"):
        store.write([traced(2)])
    monkeypatch.undo()
    assert everything_in(store.folder) == before
    again = new_store(tmp_path)
    assert again.done == {"1"}
    again.write([traced(2)])
    assert again.done == {"1", "2"}


def test_a_disk_that_is_full_from_the_start_leaves_no_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(StoreError, match="No space left on device"):
        new_store(tmp_path)
    assert everything_in(tmp_path) == ["run"]


def test_ctrl_c_while_writing_leaves_no_part(tmp_path, monkeypatch):
    store = new_store(tmp_path)
    before = everything_in(store.folder)

    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.write([traced(1)])
    assert everything_in(store.folder) == before


def test_temporary_files_are_never_parts_and_only_old_ones_are_removed(tmp_path):
    store = new_store(tmp_path)
    old, young = store.folder / "parts" / ".fasttrace-1.parquet", store.folder / ".fasttrace-2.json"
    for path in (old, young):
        path.write_bytes(b"half")
    assert Store.read(store.folder).damaged == ()
    two_hours_ago = time.time() - 7200
    os.utime(old, (two_hours_ago, two_hours_ago))
    again = new_store(tmp_path)
    assert not old.exists()
    assert young.exists()
    assert again.damaged == ()


def test_a_new_file_is_made_once_also_where_there_are_no_hard_links(tmp_path, monkeypatch):
    assert write_new(tmp_path / "a", b"first")
    assert not write_new(tmp_path / "a", b"second")
    monkeypatch.setattr(files.os, "link", no_space)
    assert write_new(tmp_path / "b", b"first")
    assert not write_new(tmp_path / "b", b"second")
    assert [(tmp_path / name).read_bytes() for name in "ab"] == [b"first"] * 2
    assert everything_in(tmp_path) == ["a", "b"]


# Several processes.


def run_rank(folder, rank, barrier, fingerprint, answers):
    barrier.wait()
    try:
        store = Store.open(folder, fingerprint)
        store.describe("facts", 30)
        for number in range(rank, 30, 2):
            store.write([traced(number)] if number % 3 else [skipped(number), traced(1000)], rank=rank)
        answers.put(sorted(store.done))
    except StoreError as error:
        answers.put(str(error))


def run_two(folder, fingerprints):
    spawn = multiprocessing.get_context("spawn")
    barrier, answers = spawn.Barrier(2), spawn.Queue()
    ranks = [spawn.Process(target=run_rank, args=(folder, i, barrier, fingerprints[i], answers)) for i in range(2)]
    for process in ranks:
        process.start()
    found = [answers.get(timeout=120) for _ in ranks]
    for process in ranks:
        process.join(timeout=60)
    assert [process.exitcode for process in ranks] == [0, 0]
    return found


def test_two_processes_make_one_store_and_fill_it_together(tmp_path):
    run_two(tmp_path / "run", [FINGERPRINT, FINGERPRINT])
    store = Store.read(tmp_path / "run")
    assert ids(store) == [*map(str, range(30)), "1000"]
    assert all(record == (traced if record.result else skipped)(record.fact.id) for record in store.records())
    assert store.damaged == ()
    assert not [name for name in everything_in(tmp_path) if ".fasttrace-" in name]


def test_of_two_different_runs_that_start_at_once_one_gets_the_folder(tmp_path):
    found = run_two(tmp_path / "run", [FINGERPRINT, FINGERPRINT | {"samples": 3}])
    refusals = [answer for answer in found if isinstance(answer, str)]
    assert len(refusals) == 1
    assert re.search(r"samples (10|3) there, (10|3) here", refusals[0])
    assert len(Store.read(tmp_path / "run").done) == 16
