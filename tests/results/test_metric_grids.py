"""Every metric of a result: grids, effects, frames and files."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fasttrace
from fasttrace.errors import PlanError, StoreError
from fasttrace.experiment.metrics import METRICS, SPREADLESS
from fasttrace.files.writing import SCHEMA_KEY
from fasttrace.results.metric_grids import MetricGrids
from fasttrace.results.record import Record
from fasttrace.results.result import load
from fasttrace.runs import manifest, parts
from fasttrace.runs.store import Store
from tests.conftest import tiny_model
from tests.helpers.records import FINGERPRINT, STREAMS, all_metrics, fact, make_result, metric_grids, rewrite, traced


def test_the_means_over_samples_are_kept_and_of_tokens_the_most_frequent_one():
    cells = np.array([[[[7, 3, 3, 9], [5, 5, 2, 2]]]], dtype=float)
    base = np.array([4, 1, 1, 6, 6], dtype=float)
    top = MetricGrids.of_samples("top1", ("block_output",), cells, base)
    assert top.mean["block_output"].tolist() == [[3, 2]]
    assert (top.clean, top.corrupted, top.std) == (4, 1, {})
    kl = MetricGrids.of_samples("kl", ("block_output",), cells, base)
    np.testing.assert_array_equal(kl.mean["block_output"], cells[0].mean(-1))
    np.testing.assert_array_equal(kl.std["block_output"], cells[0].std(-1))
    assert (kl.clean, kl.corrupted, kl.corrupted_std) == (4, 3.5, base[1:].std())


def test_a_grid_is_of_the_metric_that_is_asked_for():
    result = all_metrics()
    assert result.metrics == METRICS
    for name in METRICS[1:]:
        given = result.others[name]
        np.testing.assert_array_equal(result.grid("mlp_activation", metric=name), given.mean["mlp_activation"])
        np.testing.assert_array_equal(result.grid("mlp_activation", name), given.mean["mlp_activation"])
        assert result.grid("mlp_activation", metric=name).dtype == np.float64
    np.testing.assert_array_equal(result.grid("block_output", metric="prob"), result.grid("block_output"))
    np.testing.assert_array_equal(result.grid("block_output", "kl_std"), result.others["kl"].std["block_output"])


@pytest.mark.parametrize(("background", "parent", "source"), [("corrupted", -1.25, 3.5), ("clean", 3.5, -1.25)])
def test_effects_are_relative_to_the_background_and_normalized_by_the_gap_without_clipping(background, parent, source):
    result = all_metrics(metadata={"background": background})
    grid = result.grid("block_output", metric="logit_diff")
    effect = result.grid("block_output", "indirect_effect", metric="logit_diff")
    normalized = result.grid("block_output", "normalized_effect", metric="logit_diff")
    np.testing.assert_array_equal(effect, grid - parent)
    np.testing.assert_array_equal(normalized, (grid - parent) / (source - parent))
    assert normalized.min() < 0 or normalized.max() > 1
    assert result.gap("logit_diff") == source - parent


def test_the_source_has_a_normalized_effect_of_1_and_the_background_of_0_in_every_metric_with_a_gap():
    ends = {stream: np.array([[3.5, -1.25]]) for stream in STREAMS}
    size = {"tokens": ("a", "b"), "token_ids": (1, 2), "span": (0, 1)}
    found = MetricGrids(ends, ends, 3.5, -1.25)
    prob = {"prob": ends, "prob_std": ends, "clean_prob": 3.5, "corrupted_prob": -1.25}
    result = make_result(**size, **prob, others=dict.fromkeys(METRICS[1:], found))
    for name in set(METRICS) - {"top1"}:
        assert result.grid("block_output", "normalized_effect", metric=name).tolist() == [[1, 0]]


def test_a_metric_without_a_gap_has_no_normalized_effect():
    result = make_result(others={"kl": metric_grids(clean=1.0, corrupted=1.0)})
    assert np.isnan(result.grid("block_output", "normalized_effect", metric="kl")).all()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"metric": "logit_diff"}, "compares the target with a foil, and there is none: give foil="),
        ({"metric": "odd"}, "unknown metric 'odd': there are prob, kl"),
        ({"value": "kl", "metric": "prob"}, "give one of the two"),
        ({"value": "rank_std"}, "unknown value 'rank_std'"),
        ({"metric": 3}, "unknown metric 3"),
    ],
)
def test_what_a_result_has_not_is_refused(arguments, match):
    with pytest.raises(PlanError, match=match):
        make_result(others={"kl": metric_grids()}).grid("block_output", **arguments)
    with pytest.raises(PlanError, match="token ids cannot be subtracted"):
        all_metrics().grid("block_output", "indirect_effect", metric="top1")


def test_the_frame_has_todays_columns_and_one_for_each_further_metric():
    frame = all_metrics().to_frame()
    today = [
        "stream",
        "layer",
        "position",
        "token",
        "in_subject",
        "prob",
        "prob_std",
        "indirect_effect",
        "normalized_effect",
    ]
    assert list(frame.columns) == [*today, *METRICS[1:]]
    effects = all_metrics().to_frame(metric="kl")
    np.testing.assert_array_equal(effects["indirect_effect"], frame["kl"].astype(float) + 1.25)


def test_the_strongest_cells_are_those_nearest_to_the_source():
    lower = {"kl": metric_grids(clean=0.0, corrupted=4.0)}
    frame = make_result(others=lower).strongest("block_output", 35, metric="kl")
    assert frame["kl"].is_monotonic_increasing
    assert all_metrics().strongest("block_output", 35, metric="logit_diff")["logit_diff"].is_monotonic_decreasing


def test_all_metrics_come_back_from_a_file(tmp_path):
    result = all_metrics()
    result.save(tmp_path / "trace.parquet")
    assert load(tmp_path / "trace.parquet") == result
    assert {"kl_std", "logit_diff"} <= set(pq.read_schema(tmp_path / "trace.parquet").names)


def test_a_file_of_the_format_without_metrics_is_read(tmp_path):
    result, path = make_result(), tmp_path / "trace.parquet"
    result.save(path)

    def older(payload):
        payload["format_version"] = 1
        del payload["metrics"], payload["fields"]["target_ids"], payload["fields"]["foil_ids"]

    rewrite(path, older)
    assert load(path) == result


def test_all_metrics_come_back_from_a_store_in_which_facts_differ_in_them(tmp_path):
    given = [
        Record(fact(1), all_metrics(), correct=True),
        traced(2),
        Record(fact(3), make_result(others={"kl": metric_grids(), "mine": metric_grids()}), correct=True),
    ]
    store = Store.open(tmp_path / "run", FINGERPRINT)
    store.write(given)
    assert list(Store.read(store.folder).records()) == given
    assert set(METRICS) <= set(store.frame().columns)


def test_a_store_of_all_metrics_is_within_three_times_one_of_prob(tmp_path):
    sizes = []
    for result in (all_metrics(), make_result()):
        shape = (48, 7)
        others = {name: metric_grids(1, name not in SPREADLESS, shape=shape) for name in result.others}
        others = {name: each for name, each in others.items() if not name.endswith("_diff")}
        noise = {s: np.random.default_rng(0).random(shape) for s in STREAMS}
        big = make_result(prob=noise, prob_std=noise, others=others)
        sizes.append(len(parts.encode_part([Record(fact(n), big) for n in range(20)], STREAMS, FINGERPRINT)))
    assert sizes[0] < 3.2 * sizes[1]


def older_store(folder):
    """What format version 2 looked like: no metric but prob."""
    store = Store.open(folder, FINGERPRINT)
    part = store.write([traced(1)])
    table, fingerprint = parts.read_part(part)
    kept = [name for name in table.column_names if name.split("_")[0] in ("prob", "std") or name in BEFORE]
    details = [name for name in kept if not name.startswith("prob_diff")]
    payload = b'{"format_version": 2, "fingerprint": %s}' % manifest.json.dumps(fingerprint).encode()
    sink = pa.BufferOutputStream()
    pq.write_table(table.select(details).replace_schema_metadata({SCHEMA_KEY: payload}), sink)
    content = sink.getvalue().to_pybytes()
    part.unlink()
    (part.parent / parts.part_name(content, 0, 0)).write_bytes(content)
    path = store.folder / "manifest.json"
    manifest.write_manifest(path, {**manifest.read_manifest(path), "format_version": 2})
    return path.parent


BEFORE = (*parts.PLAIN_COLUMNS.names, "details")


def test_a_store_of_the_earlier_format_is_read_and_not_gone_on_with(tmp_path):
    folder = older_store(tmp_path / "run")
    (record,) = Store.read(folder).records()
    assert record == traced(1)
    assert record.result.metrics == ("prob",)
    with pytest.raises(StoreError, match=r"was written by an earlier version of fasttrace.*give another folder"):
        Store.open(folder, FINGERPRINT)


def test_a_trace_has_every_metric_and_exact_ends(family):
    tracer = fasttrace.Tracer(tiny_model(family))
    result = tracer.trace([5, 9, 13, 21, 34, 55, 60], subject=(1, 3), samples=3, window=3, noise=1.0)
    assert result.metrics == tuple(name for name in METRICS if not name.endswith("_diff"))
    assert result.run_value("clean", "kl") == 0
    assert result.run_value("clean", "rank") == 0
    assert result.run_value("clean", "top1") == result.target_id
    assert np.exp(result.run_value("clean", "log_prob")) == pytest.approx(result.clean_prob, rel=1e-5)
    for stream in result.streams:
        assert (result.grid(stream, metric="kl") >= 0).all()
    assert (result.direction, result.background) == ("denoising", "corrupted")
