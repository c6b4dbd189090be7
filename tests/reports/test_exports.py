import csv
import json
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from fasttrace.errors import StoreError
from fasttrace.files.names import RESERVED, is_plain
from fasttrace.reports.exports import EXPORTS, export
from fasttrace.results.record import Record
from fasttrace.runs.store import Store
from tests.helpers.records import FINGERPRINT, fact, make_result, result_of, skipped, traced


def store_of(path, *records):
    store = Store.open(path / "run", FINGERPRINT)
    store.write(records)
    return Store.read(path / "run")


def test_rome_files_have_romes_names_and_arrays(tmp_path):
    store = store_of(tmp_path, traced(12), skipped(7), traced(3))
    paths = export(store, tmp_path / "out", "rome-npz")
    names = [f"knowledge_{i}{kind}.npz" for i in (3, 12) for kind in ("", "_attn", "_mlp")]
    assert paths == [*(tmp_path / "out" / "cases" / name for name in names), tmp_path / "out" / "cases.csv"]
    assert sorted(path.name for path in (tmp_path / "out" / "cases").iterdir()) == sorted(names)
    with np.load(tmp_path / "out" / "cases" / "knowledge_12_mlp.npz") as case:
        grid = result_of(12).grid("mlp_activation")
        np.testing.assert_array_equal(case["scores"], grid.T.astype(np.float32))
        assert case["low_score"] == 0.026176
        assert case["answer"] == " Seattle"
        assert (case["kind"], case["window"]) == ("mlp", 10)
        assert case["correct_prediction"]
        assert case["subject_range"].tolist() == [0, 4]


@pytest.mark.parametrize("correct", [True, False])
def test_whether_the_model_knew_the_fact_is_what_the_run_found(tmp_path, correct):
    export(store_of(tmp_path, Record(fact(1), make_result(), correct=correct)), tmp_path, "rome-npz")
    with np.load(tmp_path / "cases" / "knowledge_1.npz") as case:
        assert case["correct_prediction"] == correct


@pytest.mark.parametrize("names", [["b", "a2", "a10"], ["1", "01"], ["1", "-1"], ["1", "1.0"]])
def test_facts_whose_ids_are_no_numbers_are_numbered_and_a_table_says_how(tmp_path, names):
    store = store_of(tmp_path, *(traced(name) for name in names))
    export(store, tmp_path / "out", "rome-npz")
    table = pd.read_csv(tmp_path / "out" / "cases.csv", dtype={"id": str})
    assert table.known_id.tolist() == list(range(len(names)))
    assert table.id.tolist() == [record.fact.id for record in store.records()]
    for known_id, name in zip(table.known_id, table.id, strict=True):
        with np.load(tmp_path / "out" / "cases" / f"knowledge_{known_id}.npz") as case:
            np.testing.assert_array_equal(case["scores"], result_of(name).prob["block_output"].T.astype("f4"))


def streams_only(*streams):
    grid = np.ones((2, 7))
    grids = {stream: grid * i for i, stream in enumerate(streams)}
    return make_result(prob=grids, prob_std=grids, windows=dict.fromkeys(streams, 3))


def test_of_two_streams_that_rome_gives_one_name_the_activation_is_written(tmp_path):
    store = store_of(tmp_path, Record(fact(1), streams_only("mlp_output", "mlp_activation", "block_input")))
    paths = export(store, tmp_path, "rome-npz")
    assert [path.name for path in paths] == ["knowledge_1_mlp.npz", "cases.csv"]
    with np.load(paths[0]) as case:
        assert case["scores"].max() == 1


def test_streams_that_rome_does_not_know_are_refused(tmp_path):
    store = store_of(tmp_path, Record(fact(1), streams_only("block_input")))
    with pytest.raises(
        StoreError, match="the store has block_input, ROME has files for block_output, attention_output"
    ):
        export(store, tmp_path, "rome-npz")


def test_the_csv_of_a_fact_has_the_tutorials_columns(tmp_path):
    store = store_of(tmp_path, traced(12), skipped(7))
    paths = export(store, tmp_path / "out", "csv")
    streams = ("block_output", "mlp_activation", "attention_output")
    assert paths == [*(tmp_path / "out" / "12" / f"{s}.csv" for s in streams), tmp_path / "out" / "facts.csv"]
    cells = pd.read_csv(paths[0])
    assert list(cells.columns) == ["layer", "pos", "prob"]
    np.testing.assert_array_equal(cells.prob.to_numpy().reshape(5, 7), result_of(12).grid("block_output"))
    facts = pd.read_csv(paths[-1])
    assert facts.id.tolist() == [7, 12]
    assert facts.folder.isna().tolist() == [True, False]
    assert facts.reason.tolist()[0] == "no subject"


HOSTILE = ["../up", "..", ".", "", "/etc", "a/b", "a%2Fb", "a\\b", "A/B", "facts.csv", "é", "a\0b", "~"]


def test_ids_that_are_no_file_names_stay_inside_the_folder_and_apart_from_each_other(tmp_path):
    names = [*HOSTILE, "x" * 400, "x" * 401]
    store = store_of(tmp_path, *(traced(name) for name in names))
    paths = export(store, tmp_path / "out", "csv")
    folders = {path.parent.name.casefold() for path in paths[:-1]}
    assert len(folders) == len(names)
    assert all(path.parent.parent == tmp_path / "out" and path.exists() for path in paths[:-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    assert paths[-1].is_file()


def test_facts_that_are_written_while_an_export_runs_wait_for_the_next(tmp_path):
    store = store_of(tmp_path, traced(1))
    before = store.coverage()
    Store.open(tmp_path / "run", FINGERPRINT).write([traced(2)])
    assert store.done == {"1", "2"}
    assert len(export(store, tmp_path / "out", "csv", shown=before)) == 4


def test_an_unknown_format_and_a_store_without_traces_are_refused(tmp_path):
    store = store_of(tmp_path, skipped(1))
    with pytest.raises(StoreError, match="unknown format 'npz': choose from rome-npz, csv"):
        export(store, tmp_path, "npz")
    with pytest.raises(StoreError, match="no traced facts, only 1 skipped"):
        export(store, tmp_path, "csv")
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())


# What lies in the folder already.


def names_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_of_another_store_is_replaced_with_its_table_and_files_of_others_stay(tmp_path, kind):
    export(store_of(tmp_path / "a", traced(1), traced(2)), tmp_path / "out", kind)
    (tmp_path / "out" / "mine.txt").write_text("mine")
    export(store_of(tmp_path / "b", traced(7)), tmp_path / "out", kind)
    export(store_of(tmp_path / "c", traced(7)), tmp_path / "alone", kind)
    assert names_in(tmp_path / "out") == sorted([*names_in(tmp_path / "alone"), "mine.txt"])


@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize(
    "content", ["prompt,subject\na b,b\n", "", "\0\xff", "id,status,clean_prob,folder,known_id\n1,2,3,../x,../x\n"]
)
def test_a_table_that_is_no_exports_is_not_replaced(tmp_path, kind, content):
    table = tmp_path / "out" / EXPORTS[kind].table
    table.parent.mkdir()
    table.write_bytes(content.encode("latin-1"))
    with pytest.raises(StoreError, match="is not the table of an earlier export: give another folder"):
        export(store_of(tmp_path, traced(1)), tmp_path / "out", kind)
    assert names_in(tmp_path / "out") == [table.name]
    assert table.read_bytes() == content.encode("latin-1")


def test_two_formats_do_not_share_a_folder(tmp_path):
    store = store_of(tmp_path, traced(1))
    export(store, tmp_path / "out", "csv")
    before = names_in(tmp_path / "out")
    with pytest.raises(StoreError, match="holds an export in the format csv: give another folder"):
        export(store, tmp_path / "out", "rome-npz")
    assert names_in(tmp_path / "out") == before


@pytest.mark.parametrize("place", [".", "parts", "parts/csv", "damaged"])
def test_the_runs_own_folders_are_no_place_for_an_export(tmp_path, place):
    store = store_of(tmp_path, traced("parts"))
    before = names_in(store.folder)
    with pytest.raises(StoreError, match="is the run's own folder: give another one"):
        export(store, store.folder / place, "csv")
    assert names_in(store.folder) == before


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_disk_that_fills_up_leaves_the_earlier_export(tmp_path, kind, monkeypatch):
    export(store_of(tmp_path / "a", traced(1)), tmp_path / "out", kind)
    before = {name: (tmp_path / "out" / name).read_bytes() for name in names_in(tmp_path / "out")}
    right, calls = os.replace, []

    def full(old, new):
        calls.append(new)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return right(old, new)

    store = store_of(tmp_path / "b", traced(1), traced(2))
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match="No space left on device"):
        export(store, tmp_path / "out", kind)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names_in(tmp_path / "out")} == before


# Names and cells.


@pytest.mark.parametrize("name", ["con", "NUL", "aux", "com1", "prn.txt", "-rf", "x.", "x "])
def test_folders_can_be_made_on_windows_too(tmp_path, name):
    paths = export(store_of(tmp_path, traced(name)), tmp_path / "out", "csv")
    assert is_plain(paths[0].parent.name)
    assert paths[0].parent.name.split(".")[0].casefold() not in RESERVED
    assert pd.read_csv(paths[-1]).folder.tolist() == [paths[0].parent.name]


FORMULAS = ["=1+1", "+cmd", "-cmd|x", "@SUM(1)", "\t=1", "\r=1", "\n=1", "\uff1d1"]


@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize("text", [*FORMULAS, "1+1", "-1", "+5", "-2.5e3", "a=1", "'=1"])
def test_texts_that_a_spreadsheet_would_compute_begin_with_an_apostrophe_and_numbers_stay(tmp_path, kind, text):
    record = replace(traced(1), fact=fact(text, prompt=text, relation=text))
    store = store_of(tmp_path, record)
    for out, safe in (("safe", True), ("raw", False)):
        export(store, tmp_path / out, kind, spreadsheet_safe=safe)
        with (tmp_path / out / EXPORTS[kind].table).open(newline="", encoding="utf-8") as file:
            (row,) = csv.DictReader(file)
        expected = f"'{text}" if safe and text in FORMULAS else text
        assert (row["id"], row["prompt"], row["relation"]) == (expected,) * 3
        assert float(row["clean_prob"]) == record.result.clean_prob


def test_a_text_with_line_breaks_is_one_cell_and_the_export_can_be_repeated(tmp_path):
    store = store_of(tmp_path, replace(traced(1), fact=fact(1, prompt="a\r=1+1,\nb\r\n=2", target='"\r')), skipped(2))
    for _ in range(2):
        export(store, tmp_path / "out", "csv")
        facts = pd.read_csv(tmp_path / "out" / "facts.csv", dtype={"id": str})
        assert facts.id.tolist() == ["1", "2"]
        assert facts.prompt[0] == "a\r=1+1,\nb\r\n=2"
        assert facts.clean_prob[0] == result_of(1).clean_prob


def test_effects_below_zero_are_numbers_to_a_spreadsheet(tmp_path):
    record = replace(traced(1), result=result_of(1, clean_prob=0.1, corrupted_prob=0.4))
    export(store_of(tmp_path, record), tmp_path / "out", "csv")
    assert pd.read_csv(tmp_path / "out" / "facts.csv").total_effect.tolist() == [0.1 - 0.4]
