import json

import numpy as np
import pandas as pd
import pytest

from fasttrace.errors import StoreError
from fasttrace.exports import export
from fasttrace.stores import Record, Store
from tests.test_results import make_result
from tests.test_stores import FINGERPRINT, fact, result_of, skipped, traced


def store_of(path, *records):
    store = Store.open(path / "run", FINGERPRINT)
    store.write(records)
    return Store.read(path / "run")


def test_rome_files_have_romes_names_and_arrays(tmp_path):
    store = store_of(tmp_path, traced(12), skipped(7), traced(3))
    paths = export(store, tmp_path / "out", "rome-npz")
    names = [f"knowledge_{i}{kind}.npz" for i in (3, 12) for kind in ("", "_mlp", "_attn")]
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
    with pytest.raises(StoreError, match=r"the store has block_input, ROME has files for block_output, mlp_activation"):
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
