import itertools
import math

import numpy as np
import pandas as pd
import pytest

from fasttrace.errors import PlanError, StoreError
from fasttrace.reports import averages as averages_module
from fasttrace.reports.averages import ROLES, average, token_roles
from fasttrace.results.metric_grids import MetricGrids
from tests.helpers.averaged import N_LAYERS, SHAPES, STREAMS, facts, make_result, record
from tests.helpers.counts import calls_in


def one_role(values_by_fact):
    """Facts whose subject's tokens but the last, which is first or middle, have the given values."""
    for i, values in enumerate(values_by_fact):
        grid = {"block_output": np.array([[*values, 0.0, 0.0]])}
        size = len(values) + 2
        yield record(make_result((len(values), size - 1), size, 0, 1, ("block_output",), prob=grid), str(i))


def names(span, n_positions, compat=None):
    return [[ROLES[i] for i in np.flatnonzero(row)] for row in token_roles(span, n_positions, compat)]


def cells(averages, **where):
    frame = averages.to_frame()
    for column, value in where.items():
        frame = frame[frame[column] == value]
    return frame.reset_index(drop=True)


# Roles.


@pytest.mark.parametrize(
    ("span", "n_positions", "roles"),
    [
        ((1, 4), 8, "before_subject first_subject middle_subject last_subject first_subsequent further further last"),
        ((0, 2), 4, "first_subject last_subject first_subsequent last"),
        ((0, 1), 3, "last_subject first_subsequent last"),
        ((2, 4), 5, "before_subject before_subject first_subject last_subject last"),
        ((0, 3), 3, "first_subject middle_subject last"),
        ((1, 2), 2, "before_subject last"),
        ((0, 1), 1, "last"),
    ],
)
def test_every_token_has_one_role_the_last_one_it_fits(span, n_positions, roles):
    assert names(span, n_positions) == [[role] for role in roles.split()]


@pytest.mark.parametrize(("span", "n_positions"), SHAPES)
def test_roles_by_default_divide_the_prompt(span, n_positions):
    assert (token_roles(span, n_positions).sum(axis=1) == 1).all()


def test_rome_counts_a_token_in_every_role_it_fits_and_none_before_the_subject():
    assert names((1, 2), 3, "rome") == [[], ["first_subject", "last_subject"], ["first_subsequent", "last"]]
    assert names((0, 4), 4, "rome")[1:] == [["middle_subject"], ["middle_subject"], ["last_subject", "last"]]


@pytest.mark.parametrize("span", [(0, 0), (2, 1), (-1, 2), (1, 4)])
def test_a_subject_outside_the_prompt_is_refused(span):
    with pytest.raises(PlanError, match="in a prompt of 3 tokens: expected a range inside it"):
        token_roles(span, 3)


# Means.


@pytest.mark.parametrize("value", ["prob", "indirect_effect", "mean_of_ratios"])
def test_means_and_counts_are_those_of_an_obvious_loop(value):
    records = facts()
    seen: dict = {}
    for result in (each.result for each in records):
        roles = token_roles(result.span, result.n_positions)
        for stream, layer, position in itertools.product(STREAMS, range(N_LAYERS), range(result.n_positions)):
            role = ROLES[roles[position].argmax()]
            grid = result.grid(stream, "normalized_effect" if value == "mean_of_ratios" else value)
            seen.setdefault((stream, role, layer), []).append(grid[layer, position])
    frame = average(records, value=value, bootstrap=0).to_frame()
    assert len(frame) == len(seen) == 3 * 7 * N_LAYERS
    for row in frame.itertuples():
        values = seen[row.stream, row.role, row.layer]
        assert row.count == len(values)
        assert row.mean == pytest.approx(np.mean(values), rel=1e-12)
        assert row.pooled_std_error == pytest.approx(np.std(values) / math.sqrt(len(values)), rel=1e-9)


def test_the_frame_is_ordered_by_stream_role_and_block():
    frame = average(facts(), bootstrap=10).to_frame()
    columns = "stream role layer mean count facts std_error low high boot_low boot_high pooled_std_error"
    assert list(frame.columns) == columns.split()
    assert frame["stream"].unique().tolist() == list(STREAMS)
    assert frame["role"].unique().tolist() == list(ROLES)
    assert frame["layer"].tolist() == list(range(N_LAYERS)) * 21


def notebook_means(results, stream):
    """Pooled means of the six roles as ROME's notebook takes them; scores are [tokens, blocks] there."""
    pools: dict = {role: [] for role in ROLES[1:]}
    for result in results:
        scores = result.prob[stream].T
        start, stop = result.span
        pools["first_subject"].append(scores[start])
        pools["middle_subject"] += list(scores[start + 1 : stop - 1])
        pools["last_subject"].append(scores[stop - 1])
        if stop < len(scores):
            pools["first_subsequent"].append(scores[stop])
        pools["further"] += list(scores[stop + 1 : len(scores) - 1])
        pools["last"].append(scores[-1])
    return {role: (np.mean(rows, axis=0), np.std(rows, axis=0), len(rows)) for role, rows in pools.items()}


def test_compat_rome_reproduces_the_notebooks_pooled_means_and_its_interval():
    records = facts(30)
    averages = average(records, compat="rome", bootstrap=0)
    assert averages.value == "prob"
    assert averages.roles == ROLES[1:]
    for stream in STREAMS:
        for role, (means, deviations, count) in notebook_means([r.result for r in records], stream).items():
            found = cells(averages, stream=stream, role=role)
            assert found["count"].unique().tolist() == [count]
            np.testing.assert_allclose(found["mean"], means, rtol=1e-12)
            np.testing.assert_allclose(1.96 * found["pooled_std_error"], 1.96 * deviations / count**0.5, rtol=1e-9)


def test_compat_rome_leaves_out_what_the_model_does_not_know():
    known, unknown, unasked = make_result(seed=1), make_result(seed=2), make_result(seed=3)
    marked = [record(known, correct=True), record(unknown, correct=False), record(unasked)]
    averages = average(marked, compat="rome", bootstrap=0)
    assert (averages.facts, averages.wrong) == (2, 1)
    both = average([record(known), record(unasked)], compat="rome", bootstrap=0)
    pd.testing.assert_frame_equal(averages.to_frame(), both.to_frame())
    assert average(marked, bootstrap=0).facts == 3


# Errors and intervals.


def test_with_one_token_to_a_fact_the_error_is_that_of_a_plain_mean():
    values = np.random.default_rng(3).random((15, 1))
    row = cells(average(one_role(values), value="prob", bootstrap=0), role="before_subject").iloc[0]
    expected = values.std(ddof=1) / math.sqrt(15)
    assert row.std_error == pytest.approx(expected, rel=1e-12)
    reach = 2.144787 * expected  # Student's t, 14 degrees of freedom
    assert (row.low, row.high) == pytest.approx((row["mean"] - reach, row["mean"] + reach))


def test_repeating_the_tokens_of_every_fact_does_not_shrink_the_error():
    values = np.random.default_rng(3).random((15, 1))
    once = cells(average(one_role(values), value="prob", bootstrap=0), role="before_subject").iloc[0]
    often = average(one_role(np.repeat(values, 9, axis=1)), value="prob", bootstrap=0)
    repeated = cells(often, role="before_subject").iloc[0]
    assert repeated["count"] == 9 * 15
    assert repeated.facts == 15
    assert repeated.std_error == pytest.approx(once.std_error, rel=1e-12)
    assert repeated.pooled_std_error < once.pooled_std_error / 2


def test_the_error_is_the_cluster_robust_error_of_a_regression_on_a_constant():
    values = [np.random.default_rng(i).random(1 + i % 4) for i in range(12)]
    row = cells(average(one_role(values), value="prob", bootstrap=0), role="before_subject").iloc[0]
    mean = np.concatenate(values).mean()
    bread = 1 / sum(map(len, values))
    meat = sum(np.sum(one - mean) ** 2 for one in values)
    assert row.std_error == pytest.approx(math.sqrt(12 / 11 * bread * meat * bread), rel=1e-12)


def test_the_interval_holds_the_truth_in_about_19_of_20_samples():
    random = np.random.default_rng(11)
    hits = 0
    for _ in range(100):
        lengths = random.integers(1, 6, 40)
        values = [random.normal() + random.normal(size=n) / 2 for n in lengths]
        row = cells(average(one_role(values), value="prob", bootstrap=0), role="before_subject").iloc[0]
        hits += row.low <= 0 <= row.high
    assert 88 <= hits <= 99


def coverage(facts, draw, tokens, repetitions=4000):
    """How often, in percent, the interval for 0 holds 0; facts and their tokens have effects of their own."""
    random = np.random.default_rng(facts)
    hits = 0
    for _ in range(repetitions):
        counts = random.integers(1, 9, facts) if tokens is None else np.full(facts, tokens)
        own, others = draw(random, facts), draw(random, (facts, 8)) * (np.arange(8) < counts[:, None])
        found = averages_module._ratios(
            (own * counts + others.sum(axis=1))[:, None], counts.astype(float), np.empty((0, facts))
        )
        hits += found["low"][0] <= 0 <= found["high"][0]
    return 100 * hits / repetitions


def normal(random, size):
    return random.normal(size=size)


def skewed(random, size):
    return random.exponential(size=size) - 1


@pytest.mark.slow
@pytest.mark.parametrize("facts", [5, 10, 24, 100])
@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_the_interval_of_normal_effects_covers_what_it_says(facts, tokens):
    assert 94 <= coverage(facts, normal, tokens) <= 96


@pytest.mark.slow
@pytest.mark.parametrize(("facts", "least"), [(5, 91.5), (10, 92.3), (24, 93), (100, 94)])
def test_facts_of_unequal_length_cost_little_coverage(facts, least):
    """The docstring of `average` says how much."""
    assert least <= coverage(facts, normal, None) <= 96


@pytest.mark.slow
@pytest.mark.parametrize(("facts", "least"), [(5, 86), (10, 88), (24, 90), (100, 93)])
def test_skewed_effects_are_covered_as_the_docstring_says(facts, least):
    for tokens in (1, 8, None):
        assert least - 1.5 <= coverage(facts, skewed, tokens) <= 95.5


@pytest.mark.parametrize(
    ("count", "bootstrap", "said"),
    [
        (1, 50, "of one fact there is no interval: trace more"),
        (1, 0, "of one fact there is no interval: trace more"),
        (29, 50, "bootstrap intervals are too narrow for 29 facts (it takes 30): read low and high"),
        (29, 0, None),
        (30, 50, None),
    ],
)
def test_intervals_of_few_facts_come_with_a_note(count, bootstrap, said):
    records = [record(make_result(seed=seed), str(seed)) for seed in range(count)]
    found = average(records, bootstrap=bootstrap, notes=["a note"]).notes
    assert found == ("a note", *([said] if said else []))


def test_the_bootstrap_resamples_facts_and_agrees_with_the_other_interval():
    values = [np.random.default_rng(i).normal(size=1 + i % 4) for i in range(200)]
    row = cells(average(one_role(values), value="prob", bootstrap=4000), role="before_subject").iloc[0]
    assert row.boot_low == pytest.approx(row.low, abs=0.15 * row.std_error)
    assert row.boot_high == pytest.approx(row.high, abs=0.15 * row.std_error)


def test_the_bootstrap_depends_on_its_seed_alone():
    first, again, other = (average(facts(), bootstrap=50, seed=seed).to_frame() for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert (first.boot_low != other.boot_low).any()
    pd.testing.assert_series_equal(first["mean"], other["mean"])


def test_a_role_that_most_draws_miss_has_an_interval_of_the_draws_that_hit_it():
    rare = record(make_result((1, 3), 5, 1), "rare")
    common = [record(make_result((0, 3), 5, seed), str(seed)) for seed in range(2, 12)]
    found = cells(average([rare, *common], bootstrap=200), role="before_subject")
    np.testing.assert_allclose(found.boot_low, found["mean"])
    np.testing.assert_allclose(found.boot_high, found["mean"])
    assert found.std_error.isna().all()
    assert found.facts.unique().tolist() == [1]


def test_without_a_bootstrap_its_columns_are_nan():
    averages = average(facts(), bootstrap=0)
    assert averages.to_frame()[["boot_low", "boot_high"]].isna().all(axis=None)
    assert averages.totals()[["boot_low", "boot_high"]].isna().all(axis=None)


def test_one_fact_has_a_mean_and_no_interval():
    frame = average([record(make_result())], bootstrap=5).to_frame()
    assert frame["mean"].notna().all()
    assert frame[["std_error", "low", "high"]].isna().all(axis=None)


# Totals.


def test_totals_count_each_fact_once():
    records = facts()
    totals = average(records, bootstrap=20).totals()
    assert totals["quantity"].tolist() == ["clean_prob", "corrupted_prob", "total_effect", *["indirect_effect"] * 3]
    assert totals["stream"].tolist()[3:] == list(STREAMS)
    clean = np.array([r.result.clean_prob for r in records])
    low = np.array([r.result.corrupted_prob for r in records])
    effects = [np.mean(r.result.prob["mlp_activation"]) - r.result.corrupted_prob for r in records]
    expected = [clean.mean(), low.mean(), (clean - low).mean(), np.mean(effects)]
    np.testing.assert_allclose(totals["mean"].iloc[[0, 1, 2, 4]], expected, rtol=1e-12)
    assert totals["std_error"][2] == pytest.approx((clean - low).std(ddof=1) / math.sqrt(20))
    assert (totals["boot_low"] < totals["mean"]).all()
    assert (totals["facts"] == 20).all()


def test_strongest_gives_the_largest_means_first():
    averages = average(facts(), bootstrap=0)
    found = averages.strongest("mlp_activation", 3)
    assert found["mean"].tolist() == sorted(cells(averages, stream="mlp_activation")["mean"])[:-4:-1]
    with pytest.raises(PlanError, match="unknown stream 'mlp': these averages have block_output"):
        averages.strongest("mlp")
    with pytest.raises(PlanError, match="n=0: ask for at least 1"):
        averages.strongest("mlp_activation", 0)


# What is left out, and what is refused.


def test_skipped_records_are_left_out_and_counted():
    result = make_result()
    averages = average([record(reason="no subject"), record(result), record(reason="too long")], bootstrap=0)
    assert (averages.facts, averages.skipped) == (1, 2)


def test_a_fact_with_a_small_total_effect_has_no_part_in_a_mean_of_ratios_and_is_counted():
    flat, nearly = (make_result(clean_prob=0.25 + gap, corrupted_prob=0.25) for gap in (0, 0.001))
    given = [record(each) for each in (flat, nearly, make_result(clean_prob=0.9))]
    averages = average(given, value="mean_of_ratios", bootstrap=0)
    assert (averages.facts, averages.undefined) == (1, 2)
    assert average(given, bootstrap=0).facts == average(given, value="normalized_effect", bootstrap=0).facts == 3


def test_the_normalized_effect_is_a_ratio_of_sums_with_an_interval_from_the_bootstrap():
    given = facts(40)
    averages = average(given, value="normalized_effect", bootstrap=400)
    for stream, role in (("block_output", "last_subject"), ("mlp_activation", "further")):
        effects, gaps = np.zeros(N_LAYERS), 0.0
        for result in (each.result for each in given):
            of_role = token_roles(result.span, result.n_positions)[:, ROLES.index(role)]
            effects += result.grid(stream, "indirect_effect")[:, of_role].sum(1)
            gaps += of_role.sum() * result.total_effect
        rows = averages.to_frame().query("stream == @stream and role == @role")
        np.testing.assert_allclose(rows["mean"], effects / gaps, rtol=1e-12)
        assert ((rows["boot_low"] < rows["mean"]) & (rows["mean"] < rows["boot_high"])).all()


def test_any_metric_is_averaged_and_facts_without_it_are_left_out_and_counted():
    def with_metric(seed, foil):
        random = np.random.default_rng(seed)
        grids = {stream: random.standard_normal((N_LAYERS, 7)).astype(np.float32) for stream in STREAMS}
        names = ("kl", "logit_diff") if foil else ("kl",)
        others = {name: MetricGrids(grids, grids, clean=2.0, corrupted=-1.0 - seed) for name in names}
        return make_result(seed=seed, others=others)

    results = [with_metric(seed, foil=seed != 1) for seed in range(3)]
    averages = average([record(each, str(n)) for n, each in enumerate(results)], metric="logit_diff", bootstrap=0)
    assert (averages.facts, averages.undefined, averages.metric) == (2, 1, "logit_diff")
    totals = averages.totals().set_index("quantity")["mean"]
    assert (totals["clean_logit_diff"], totals["corrupted_logit_diff"], totals["total_effect"]) == (2, -2, 4)
    expected = np.mean([results[n].grid("block_output", metric="logit_diff")[2, 6] + 1 + n for n in (0, 2)])
    rows = averages.to_frame().query("stream == 'block_output' and role == 'last' and layer == 2")
    assert rows["mean"].item() == pytest.approx(expected)
    itself = average([record(each) for each in results], metric="kl", value="kl", bootstrap=0)
    assert (itself.facts, itself.value) == (3, "kl")
    with pytest.raises(PlanError, match="unknown metric 'odd'"):
        average([record(results[0])], metric="odd")
    with pytest.raises(PlanError, match="'top1' has no average"):
        average([record(results[0])], metric="top1")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], r"no fact to average \(0 skipped"),
        ([record(reason="no subject")], r"no fact to average \(1 skipped.*trace at least one"),
        ([record(make_result()), record(make_result(n_layers=5), "b")], "fact 'b' has n_layers 5, those before it 4"),
        ([record(make_result()), record(make_result(streams=STREAMS[:1]), "b")], "fact 'b' has streams"),
        ([record(make_result()), record(make_result(windows=dict.fromkeys(STREAMS, 3)))], "has windows"),
        ([record(make_result(prob={s: np.full((4, 7), np.nan) for s in STREAMS}))], "cells that are not finite"),
    ],
)
def test_what_cannot_be_averaged_is_refused_with_the_reason(records, message):
    with pytest.raises(PlanError, match=message):
        average(records, bootstrap=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": "prob_std"}, "unknown value 'prob_std': expected one of prob, indirect_effect"),
        ({"compat": "memit"}, "unknown compat 'memit'"),
        ({"compat": "rome", "value": "indirect_effect"}, "ROME's notebook averages 'prob'"),
        ({"bootstrap": -1}, "bootstrap=-1: ask for 0 draws or more"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(options, message):
    def unread():
        raise AssertionError
        yield

    with pytest.raises(PlanError, match=message):
        average(unread(), **options)


def test_a_model_is_named_when_all_results_agree():
    other = make_result(metadata={"model": "gpt2"})
    assert average([record(make_result())], bootstrap=0).model == "gpt2-xl"
    assert average([record(make_result()), record(other)], bootstrap=0).model is None


# Files and speed.


def test_averages_are_saved_as_two_csv_files(tmp_path):
    averages = average(facts(), bootstrap=20)
    paths = averages.save_csv(tmp_path / "new" / "average.csv")
    assert [path.name for path in paths] == ["average.csv", "average_totals.csv"]
    pd.testing.assert_frame_equal(pd.read_csv(paths[0]), averages.to_frame())
    pd.testing.assert_frame_equal(pd.read_csv(paths[1])[["mean", "high"]], averages.totals()[["mean", "high"]])


def test_a_csv_that_cannot_be_written_is_a_store_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        average(facts(), bootstrap=0).save_csv(tmp_path / "file" / "average.csv")


def test_frames_are_copies():
    averages = average(facts(), bootstrap=0)
    for frame in (averages.to_frame(), averages.totals()):
        frame["mean"] = 0.0
    assert (averages.to_frame()["mean"] != 0).all()
    assert (averages.totals()["mean"] != 0).all()


def test_work_grows_with_the_number_of_facts_and_no_faster():
    result = make_result((1, 5), 11, n_layers=48)
    few, some, averages = (averaged(result, facts) for facts in (3, 103, 1209))
    per_fact = (some[1] - few[1]) / 100
    assert averages[1] <= few[1] + 1.1 * per_fact * 1206
    averages = averages[0]
    assert averages.facts == 1209
    assert len(averages.to_frame()) == 3 * 7 * 48


def averaged(result, facts):
    """Averages of a result that many times, and the calls they took."""
    return calls_in(lambda: average((record(result, str(i)) for i in range(facts)), bootstrap=100))
