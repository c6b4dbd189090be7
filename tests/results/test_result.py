import json
import math
import os
import warnings

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fasttrace.errors import PlanError, StoreError
from fasttrace.experiment.metrics import METRICS
from fasttrace.files.writing import FORMAT_VERSION, atomic_write
from fasttrace.planning.cost import Cost
from fasttrace.results.result import load
from fasttrace.results.rome import rome_file_name
from tests.helpers.records import N_LAYERS, STREAMS, TOKENS, all_metrics, make_result, rewrite


def one_stream(prob, **changes):
    grid = np.asarray(prob, dtype=float)
    size = {"tokens": tuple("abcdefgh"[: grid.shape[1]]), "token_ids": tuple(range(grid.shape[1]))}
    grids = {"prob": {"block_output": grid}, "prob_std": {"block_output": grid * 0}}
    return make_result(**grids, **size, windows={"block_output": 1}, **changes)


def refuse(*_args, **_kwargs):
    raise KeyboardInterrupt


# Grids, effects and the frame.


def test_grid_gives_each_value_with_layers_down_and_positions_across():
    result = make_result()
    prob = result.prob["mlp_activation"]
    assert result.grid("mlp_activation").shape == (N_LAYERS, len(TOKENS))
    np.testing.assert_array_equal(result.grid("mlp_activation"), prob)
    np.testing.assert_array_equal(result.grid("mlp_activation", "prob_std"), result.prob_std["mlp_activation"])
    np.testing.assert_array_equal(result.grid("mlp_activation", "indirect_effect"), prob - 0.026176)
    np.testing.assert_allclose(
        result.grid("mlp_activation", "normalized_effect"), (prob - 0.026176) / (0.97638 - 0.026176)
    )


@pytest.mark.parametrize("value", ["prob", "prob_std", "indirect_effect", "normalized_effect"])
def test_writing_into_a_grid_leaves_the_result_alone(value):
    result = make_result()
    result.grid("block_output", value)[:] = -1
    assert result == make_result()


def test_the_arrays_given_to_a_result_are_copied_and_its_own_are_read_only():
    given_grid = np.full((2, 2), 0.5)
    result = one_stream(given_grid)
    given_grid[:] = 0
    assert result.grid("block_output").min() == 0.5
    with pytest.raises(ValueError, match="read-only"):
        result.prob["block_output"][0, 0] = 1


def test_an_unknown_stream_or_value_is_refused_with_the_known_names():
    with pytest.raises(PlanError, match=r"unknown stream 'mlp': this result has block_output, mlp_activation"):
        make_result().grid("mlp")
    with pytest.raises(PlanError, match=r"unknown value 'std': this result has prob, prob_std"):
        make_result().grid("block_output", "std")


def test_the_frame_has_a_row_per_cell_in_the_order_stream_layer_position():
    result = make_result()
    frame = result.to_frame()
    columns = "stream layer position token in_subject prob prob_std indirect_effect normalized_effect"
    assert list(frame.columns) == columns.split()
    assert len(frame) == 3 * N_LAYERS * len(TOKENS)
    row = frame.iloc[len(TOKENS) * N_LAYERS + 2 * len(TOKENS) + 3]
    assert (row.stream, row.layer, row.position, row.token) == ("mlp_activation", 2, 3, "le")
    assert row.prob == result.prob["mlp_activation"][2, 3]
    assert frame[frame.in_subject].position.unique().tolist() == [0, 1, 2, 3]


def test_the_total_effect_is_clean_minus_corrupted_and_may_be_negative():
    assert make_result().total_effect == 0.97638 - 0.026176
    backwards = one_stream([[0.3]], clean_prob=0.1, corrupted_prob=0.2)
    assert backwards.total_effect == pytest.approx(-0.1)
    assert backwards.grid("block_output", "normalized_effect")[0, 0] == pytest.approx(-1)


def test_normalized_effects_are_never_clipped():
    effects = one_stream([[0.1, 0.9]], clean_prob=0.5, corrupted_prob=0.3).grid("block_output", "normalized_effect")
    np.testing.assert_allclose(effects, [[-1, 3]])


@pytest.mark.parametrize("clean", [0.25, np.nextafter(0.25, 1)])
def test_a_total_effect_of_nothing_gives_no_warning(clean):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = one_stream([[0.25, 1e300]], clean_prob=clean, corrupted_prob=0.25).to_frame()
    assert frame.normalized_effect.isna().tolist() == ([True, True] if clean == 0.25 else [False, False])


def test_strongest_cells_come_by_falling_indirect_effect_with_nan_last():
    result = one_stream([[0.1, math.nan, 0.7], [0.9, 0.2, 0.7]])
    cells = result.strongest("block_output", n=4)
    assert cells[["layer", "position"]].values.tolist() == [[1, 0], [0, 2], [1, 2], [1, 1]]
    assert len(result.strongest("block_output", n=100)) == 6
    assert math.isnan(result.strongest("block_output", n=6).prob.iloc[-1])


def test_strongest_refuses_no_cells_and_unknown_streams():
    with pytest.raises(PlanError, match="n=0: ask for at least 1"):
        make_result().strongest("block_output", n=0)
    with pytest.raises(PlanError, match="unknown stream"):
        make_result().strongest("query_output")


def test_top_tokens_lists_the_run_that_was_asked_for_best_first():
    tokens = make_result().top_tokens("corrupted", n=2)
    assert tokens.to_dict("list") == {
        "id": [5401, 7312],
        "token": [" Los", " Seattle"],
        "prob": [0.033, 0.026176],
    }
    assert make_result().top_tokens(n=1).id.tolist() == [7312]


@pytest.mark.parametrize(
    ("run", "n", "message"),
    [
        ("clean", 3, "keeps the 2 most probable"),
        ("clean", 0, "at least 1"),
        ("dirty", 1, "has clean, corrupted"),
    ],
)
def test_top_tokens_refuses_what_the_result_does_not_keep(run, n, message):
    with pytest.raises(PlanError, match=message):
        make_result().top_tokens(run, n)


def test_the_summary_is_strict_json_with_the_strongest_cells_and_the_metadata():
    result = make_result(corrupted_std=math.nan)
    summary = json.loads(json.dumps(result.summary(n=2), allow_nan=False))
    assert summary["clean_prob"] == 0.97638
    assert summary["corrupted_std"] is None
    assert summary["model"] == "gpt2-xl"
    assert summary["cost"]["rows"] == 70
    mlp = summary["streams"]["mlp_activation"]
    best = result.strongest("mlp_activation", 1).iloc[0]
    assert mlp["window"] == 10
    assert len(mlp["strongest"]) == 2
    assert mlp["strongest"][0]["layer"] == best.layer
    assert mlp["strongest"][0]["prob"] == best.prob


def test_the_repr_fits_on_a_line_whatever_the_grids():
    text = repr(make_result())
    assert len(text) < 250
    assert "' Seattle'" in text


# What a result accepts, and equality.


def test_grids_that_do_not_fit_the_tokens_are_refused_with_both_shapes():
    grids = {"block_output": np.zeros((2, 3))}
    with pytest.raises(PlanError, match=r"\(2, 3\): expected \(2, 7\)"):
        make_result(prob=grids, prob_std=grids)
    with pytest.raises(PlanError, match="need both"):
        make_result(prob_std={})
    with pytest.raises(PlanError, match="1 token ids for 7 tokens"):
        make_result(token_ids=(1,))


def test_metadata_that_json_cannot_hold_is_refused_when_the_result_is_made():
    assert make_result(metadata={"sigma": np.float32(0.5), "span": (0, 4)}).metadata == {
        "sigma": 0.5,
        "span": [0, 4],
    }
    with pytest.raises(StoreError, match=r"metadata is to be stored as JSON .*: give texts, numbers or lists"):
        make_result(metadata={"device": object()})


@pytest.mark.parametrize(
    "change",
    [
        {"clean_prob": np.nextafter(0.97638, 1)},
        {"target": None},
        {"tokens": (*TOKENS[:-1], " 東亰")},
        {"windows": {"block_output": 1, "mlp_activation": 10, "attention_output": 3}},
        {"cost": Cost(71, 123.5, 700.0, 10**12)},
        {"metadata": {"model": "gpt2"}},
        {"top": {"clean": (), "corrupted": ()}},
    ],
)
def test_results_that_differ_in_one_field_are_not_equal(change):
    assert make_result() == make_result()
    assert make_result(**change) != make_result()


def test_results_are_compared_bit_for_bit_except_that_nan_equals_nan():
    assert one_stream([[math.nan, 0.5]]) == one_stream([[math.nan, 0.5]])
    assert one_stream([[0.0, 0.5]]) != one_stream([[-0.0, 0.5]])
    assert one_stream([[0.5]]) != one_stream([[0.5, 0.5]])
    assert make_result() != "a result"


# The parquet file.


def test_a_result_survives_saving_and_loading_exactly(tmp_path):
    result = make_result(clean_prob=0.026176, corrupted_std=math.nan, target="\ud800", tokens=("\0", *TOKENS[1:]))
    result.save(tmp_path / "made" / "on the way" / "trace.parquet")
    loaded = load(tmp_path / "made" / "on the way" / "trace.parquet")
    assert loaded == result
    assert loaded.streams == STREAMS
    assert np.isnan(loaded.grid("block_output", "normalized_effect")).all()
    assert type(loaded.span) is tuple


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_bits_and_any_unicode_survive_the_file(data, tmp_path_factory):
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))
    any_float = st.floats(width=64)
    grids = [
        {
            stream: data.draw(hnp.arrays(np.float64, shape, elements=any_float))
            for stream in ("block_output", "mlp_output")
        }
        for _ in range(2)
    ]
    any_text = st.text(st.characters(exclude_categories=()), max_size=3)
    tokens = tuple(data.draw(st.lists(any_text, min_size=shape[1], max_size=shape[1])))
    result = make_result(
        prob=grids[0],
        prob_std=grids[1],
        tokens=tokens,
        token_ids=range(len(tokens)),
        span=(0, 1),
        clean_prob=data.draw(any_float),
        target=data.draw(any_text),
        windows={"block_output": 1, "mlp_output": 3},
        metadata={"prompt": data.draw(any_text)},
    )
    path = tmp_path_factory.mktemp("trace") / "trace.parquet"
    result.save(path)
    assert load(path) == result


def test_the_file_is_the_tidy_frame_for_any_reader_of_parquet(tmp_path):
    make_result().save(tmp_path / "trace.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "trace.parquet"), make_result().to_frame())


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError, OSError("disk full")])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, interrupt):
    path = tmp_path / "trace.parquet"
    make_result().save(path)
    before = path.read_bytes()

    def write_half(_table, where, **_options):
        where.write_bytes(before[: len(before) // 2])
        raise interrupt

    monkeypatch.setattr(pq, "write_table", write_half)
    expected = StoreError if isinstance(interrupt, OSError) else interrupt
    with pytest.raises(expected):
        make_result(target_id=1).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["trace.parquet"]


def test_an_interrupt_before_the_rename_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "trace.parquet"
    path.write_text("old")
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, refuse)
            with pytest.raises(KeyboardInterrupt):
                make_result().save(path)
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["trace.parquet"]


def test_the_temporary_file_lies_beside_the_target_and_keeps_its_suffix(tmp_path):
    with atomic_write(tmp_path / "a" / "x.npz") as temporary:
        assert temporary.parent == tmp_path / "a"
        assert temporary.suffix == ".npz"
        temporary.write_text("whole")
        assert not (tmp_path / "a" / "x.npz").exists()
    assert (tmp_path / "a" / "x.npz").read_text() == "whole"
    assert os.listdir(tmp_path / "a") == ["x.npz"]


def test_a_place_that_cannot_be_written_is_named_in_the_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"cannot write .*trace.parquet .*give a path in a folder you may"):
        make_result().save(tmp_path / "file" / "trace.parquet")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="cannot write"):
        make_result().save(tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_loading_nothing_or_a_folder_says_so(tmp_path):
    with pytest.raises(StoreError, match=r"nothing at .*no.parquet"):
        load(tmp_path / "no.parquet")
    with pytest.raises(StoreError, match="a folder at"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99])
def test_a_file_cut_short_is_refused(tmp_path, keep):
    path = tmp_path / "trace.parquet"
    make_result().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(StoreError, match="cannot read"):
        load(path)


def test_a_flipped_bit_in_a_grid_is_found(tmp_path):
    path = tmp_path / "trace.parquet"
    make_result().save(path)
    content = bytearray(path.read_bytes())
    pages = pq.read_metadata(path).row_group(0).column(5)
    assert pages.path_in_schema == "prob"
    content[pages.data_page_offset + pages.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="cannot read"):
        load(path)


def test_a_parquet_file_of_someone_else_is_refused(tmp_path):
    make_result().to_frame().to_parquet(tmp_path / "frame.parquet")
    with pytest.raises(StoreError, match="without fasttrace's metadata"):
        load(tmp_path / "frame.parquet")


def test_a_newer_format_asks_for_an_upgrade(tmp_path):
    path = tmp_path / "trace.parquet"
    make_result().save(path)
    rewrite(path, lambda payload: payload.update(format_version=FORMAT_VERSION + 1))
    with pytest.raises(StoreError, match=rf"format version {FORMAT_VERSION + 1}.*up to {FORMAT_VERSION}: upgrade"):
        load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda payload: b"{",
        lambda payload: b"[]",
        lambda payload: payload.pop("format_version"),
        lambda payload: payload.pop("streams"),
        lambda payload: payload.update(shape=[1, 7]),
        lambda payload: payload["fields"].pop("windows"),
        lambda payload: payload["fields"].update(token_ids=[1]),
        lambda payload: payload["fields"].update(cost={"rows": 1}),
    ],
)
def test_damaged_metadata_is_refused(tmp_path, change):
    path = tmp_path / "trace.parquet"
    make_result().save(path)
    rewrite(path, change)
    with pytest.raises(StoreError, match="damaged"):
        load(path)


def test_a_lost_column_is_refused(tmp_path):
    path = tmp_path / "trace.parquet"
    make_result().save(path)
    pq.write_table(pq.read_table(path).drop_columns(["prob_std"]), path)
    with pytest.raises(StoreError, match="damaged"):
        load(path)


# The tutorial's CSV files and ROME's npz files.


def test_csv_files_have_the_tutorials_columns_and_every_digit(tmp_path):
    result = make_result()
    paths = result.to_csv(tmp_path / "out")
    assert paths == [tmp_path / "out" / f"{stream}.csv" for stream in STREAMS]
    lines = paths[1].read_bytes().decode().split("\n")
    assert lines[0] == "layer,pos,prob"
    assert lines[1].startswith("0,0,")
    assert lines[len(TOKENS) + 2].startswith("1,1,")
    assert lines[-1] == ""
    probs = [float(line.split(",")[2]) for line in lines[1:-1]]
    assert probs == result.grid("mlp_activation").ravel().tolist()


def test_csv_files_have_every_other_metric_beside_the_tutorials_columns(tmp_path):
    result = all_metrics()
    paths = result.to_csv(tmp_path)
    plain = make_result().to_csv(tmp_path / "plain")
    for stream, path, before in zip(STREAMS, paths, plain, strict=True):
        cells = pd.read_csv(path, dtype=dict.fromkeys(METRICS[1:], np.float32))
        assert list(cells.columns) == ["layer", "pos", *METRICS]
        for name in METRICS:
            np.testing.assert_array_equal(cells[name], result.grid(stream, metric=name).ravel())
        pd.testing.assert_frame_equal(cells[["layer", "pos", "prob"]], pd.read_csv(before))


def test_rome_files_have_exactly_romes_keys_types_and_shapes(tmp_path):
    path = make_result().save_rome_npz(tmp_path, "block_output", known_id=3)
    assert path == tmp_path / "knowledge_3.npz"
    with np.load(path) as case:
        found = {name: (case[name].dtype.kind + str(case[name].dtype.itemsize), case[name].shape) for name in case}
    tokens, n_tokens = "U" + str(4 * len(" Space")), len(TOKENS)
    assert found == {
        "scores": ("f4", (n_tokens, N_LAYERS)),
        "low_score": ("f8", ()),
        "high_score": ("f4", ()),
        "input_ids": ("i8", (n_tokens,)),
        "input_tokens": (tokens, (n_tokens,)),
        "subject_range": ("i8", (2,)),
        "answer": ("U" + str(4 * len(" Seattle")), ()),
        "window": ("i8", ()),
        "correct_prediction": ("b1", ()),
        "kind": ("U4", ()),
    }


def test_rome_files_hold_the_transposed_grid_and_what_it_is_compared_with(tmp_path):
    result = make_result()
    with np.load(result.save_rome_npz(tmp_path / "case.npz", "attention_output")) as case:
        np.testing.assert_array_equal(case["scores"], result.grid("attention_output").T.astype("f4"))
        assert case["low_score"] == 0.026176
        assert case["high_score"] == np.float32(0.97638)
        assert case["input_tokens"].tolist() == list(TOKENS)
        assert case["subject_range"].tolist() == [0, 4]
        assert case["answer"].item() == " Seattle"
        assert case["kind"].item() == "attn"
        assert case["correct_prediction"].item() is True


@pytest.mark.parametrize(
    ("stream", "name"),
    [
        ("block_output", "knowledge_12.npz"),
        ("mlp_activation", "knowledge_12_mlp.npz"),
        ("mlp_output", "knowledge_12_mlp.npz"),
        ("attention_output", "knowledge_12_attn.npz"),
    ],
)
def test_rome_file_names_carry_the_kind(stream, name):
    assert rome_file_name(12, stream) == name


@pytest.mark.parametrize(
    ("windows", "stream", "width"),
    [
        ({"block_output": 1, "mlp_activation": 4}, "block_output", 4),
        ({"block_output": 1, "mlp_activation": 4}, "mlp_activation", 4),
        ({"block_output": 1}, "block_output", 10),
    ],
)
def test_romes_window_is_the_sweeps_window_in_the_block_grid_too(tmp_path, windows, stream, width):
    grids = {name: np.zeros((1, 7)) for name in windows}
    result = make_result(prob=grids, prob_std=grids, windows=windows)
    with np.load(result.save_rome_npz(tmp_path / "case.npz", stream)) as case:
        assert case["window"] == width


@pytest.mark.parametrize(
    ("target_id", "argument", "stored"),
    [(7312, None, True), (11, None, False), (11, True, True), (7312, False, False)],
)
def test_a_prediction_is_correct_if_said_so_or_if_the_target_is_the_clean_top_token(
    tmp_path, target_id, argument, stored
):
    result = make_result(target_id=target_id)
    path = result.save_rome_npz(tmp_path / "case.npz", "block_output", correct_prediction=argument)
    with np.load(path) as case:
        assert case["correct_prediction"].item() is stored


def test_rome_files_without_a_tokenizer_answer_with_the_id(tmp_path):
    with np.load(make_result(target=None).save_rome_npz(tmp_path / "case.npz", "block_output")) as case:
        assert case["answer"].item() == "7312"


def test_rome_files_refuse_streams_rome_lacks_and_folders_without_a_number(tmp_path):
    grids = {"query_output": np.zeros((1, 7))}
    result = make_result(prob=grids, prob_std=grids, windows={"query_output": 10})
    with pytest.raises(PlanError, match=r"ROME has no files for stream 'query_output': it knows block_output"):
        result.save_rome_npz(tmp_path / "case.npz", "query_output")
    with pytest.raises(PlanError, match="unknown stream"):
        make_result().save_rome_npz(tmp_path / "case.npz", "mlp_output")
    with pytest.raises(PlanError, match="give known_id"):
        make_result().save_rome_npz(tmp_path, "block_output")
    assert os.listdir(tmp_path) == []
