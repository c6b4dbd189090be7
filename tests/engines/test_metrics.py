"""Metrics of rows of logits: what their definitions give in float64, and the same from every engine."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fasttrace.engines import ENGINES
from fasttrace.engines.job import answer_tables
from fasttrace.engines.memory import Budget
from fasttrace.engines.metrics import NONE, Answers, scored
from fasttrace.engines.passes import run_in_passes
from fasttrace.errors import PlanError
from fasttrace.experiment.cells import STREAMS
from fasttrace.experiment.metrics import FOIL_METRICS, METRICS
from tests.conftest import all_grids, make_job, tiny_anatomy

VOCABULARY = 23


def by_definition(logits, clean, targets, foils):
    """Metrics [metric] of one run's logits [vocab], in float64, one formula after the other."""
    probs, clean_probs = (np.exp(y - y.max()) / np.exp(y - y.max()).sum() for y in (logits, clean))
    prob = probs[targets].sum()
    return {
        "prob": prob,
        "log_prob": np.log(prob),
        "logit": logits[targets].mean(),
        "logit_diff": logits[targets].mean() - logits[foils].mean(),
        "prob_diff": prob - probs[foils].sum(),
        "kl": (clean_probs * (np.log(clean_probs) - np.log(probs))).sum(),
        "rank": (logits > logits[targets].max()).sum(),
        "top1": logits.argmax(),
    }


def answers_of(clean, targets, foils, own=()):
    width, n_foils = max(map(len, targets)), max(map(len, foils))
    tables = [
        torch.tensor([[*ids, *[NONE] * (size - len(ids))] for ids in sets], dtype=torch.long).view(len(sets), size)
        for sets, size in ((targets, width), (foils, n_foils))
    ]
    return Answers.of(clean, *tables, own)


ids = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=3, unique=True)


@given(
    seed=st.integers(0, 999),
    prompts=st.lists(st.tuples(ids, ids, st.integers(1, 4)), min_size=1, max_size=4),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
)
def test_metrics_are_their_definitions_for_sets_of_tokens_and_several_prompts(seed, prompts, scale):
    random = torch.Generator().manual_seed(seed)
    clean = scale * torch.randn(len(prompts), VOCABULARY, generator=random, dtype=torch.float64)
    targets, foils, sizes = zip(*prompts, strict=True)
    logits = scale * torch.randn(sum(sizes), VOCABULARY, generator=random, dtype=torch.float64) - 100
    numbers = np.repeat(np.arange(len(prompts)), sizes)
    found = scored(logits, answers_of(clean, targets, foils), numbers, torch.from_numpy(numbers)).numpy()
    for row, prompt in enumerate(numbers):
        expected = by_definition(logits[row].numpy(), clean[prompt].numpy(), targets[prompt], foils[prompt])
        np.testing.assert_allclose(found[:, row], [expected[name] for name in METRICS], rtol=1e-9, atol=1e-12)


def test_equal_rows_have_no_divergence_and_no_row_has_less():
    logits = 4 * torch.randn(50, 50_257, generator=torch.Generator().manual_seed(0))
    close = logits[:1] + 1e-4 * logits[1:]
    answers = answers_of(logits[:1], [[7]], [[]])
    rows = torch.cat((logits[:1], close))
    found = scored(rows, answers, np.zeros(len(rows), dtype=int), torch.zeros(len(rows), dtype=torch.long))
    divergence = found[answers.names.index("kl")].double()
    exact_clean, exact = (each.double().log_softmax(-1) for each in (logits[:1], rows))
    expected = (exact_clean.exp() * (exact_clean - exact)).sum(-1)
    assert divergence[0] == 0
    assert (divergence >= 0).all()
    torch.testing.assert_close(divergence, expected, rtol=1e-3, atol=3e-7)


def test_without_a_foil_nothing_is_compared_with_it():
    answers = answers_of(torch.randn(1, VOCABULARY), [[3]], [[]])
    assert answers.names == tuple(name for name in METRICS if name not in FOIL_METRICS)


def test_swapping_target_and_foil_changes_the_sign():
    logits = torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(1))
    rows = (np.zeros(6, dtype=int), torch.zeros(6, dtype=torch.long))
    one, other = (answers_of(logits[:1], [a], [b]) for a, b in (([3], [5, 6]), ([5, 6], [3])))
    there, back = scored(logits, one, *rows), scored(logits, other, *rows)
    for name in FOIL_METRICS:
        torch.testing.assert_close(there[METRICS.index(name)], -back[METRICS.index(name)])


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_metrics_of_plain_forward_passes(family, engine):
    job = make_job(7, (2, 4), 2, all_grids(STREAMS, 3, 7), target=(11, 4), foil=(5, 9, 30))
    anatomy = tiny_anatomy(family, torch.float64)
    expected = ENGINES["reference"](anatomy, job, lambda: None)
    found = ENGINES[engine](anatomy, job, lambda: None)
    assert found.names == METRICS
    assert (found.targets, found.foils) == ((11, 4), (5, 9, 30))
    for name in METRICS:
        np.testing.assert_allclose(found.of(name), expected.of(name), rtol=1e-7, atol=1e-10, err_msg=name)
        np.testing.assert_allclose(found.base_of(name), expected.base_of(name), rtol=1e-7, atol=1e-10, err_msg=name)
    assert np.exp(found.of("log_prob")) == pytest.approx(found.of("prob"), rel=1e-12)
    assert found.base_of("kl")[0] == pytest.approx(0, abs=1e-12)
    assert np.ptp(expected.of("logit_diff")) > 0.01, "the cells must differ, or the comparison says nothing"


def test_prompts_that_share_a_pass_keep_their_own_answers(family):
    anatomy = tiny_anatomy(family)
    kinds = ((5, None, ()), (7, 3, (5,)), (6, (2, 9), (5, 6, 7)), (7, (1, 2, 3), ()))
    jobs = [make_job(n, (1, 3), 2, all_grids(STREAMS, 1, n), target=target, foil=foil) for n, target, foil in kinds]
    for found, job in zip(ENGINES["wavefront"].run_jobs(anatomy, jobs, lambda: None), jobs, strict=True):
        alone = ENGINES["reference"](anatomy, job, lambda: None)
        assert found.names == alone.names == tuple(n for n in METRICS if job.foil or n not in FOIL_METRICS)
        np.testing.assert_allclose(found.table, alone.table, rtol=2e-3, atol=1e-5)


def test_passes_over_samples_and_over_cells_add_up_to_all_metrics(family):
    anatomy = tiny_anatomy(family)
    job = make_job(6, (1, 3), 5, all_grids(STREAMS, 1, 6), foil=(5,))
    (whole, _), (parts, _) = (
        run_in_passes(ENGINES["wavefront"], anatomy, job, Budget(tokens)) for tokens in (100_000, 60)
    )
    np.testing.assert_allclose(parts.table, whole.table, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(parts.base, whole.base, rtol=1e-3, atol=1e-6)
    for run in ("clean", "corrupted"):
        np.testing.assert_array_equal(parts.top[run][0][:5], whole.top[run][0][:5])
        np.testing.assert_allclose(parts.top[run][1], whole.top[run][1], rtol=1e-4)


def test_a_users_own_metric_is_taken_as_the_built_in_ones_are(family):
    def margin(logits, read):
        best = logits.topk(2, -1).values
        assert (read.clean.sum(-1) - 1).abs().max() < 1e-5
        return best[:, 0] - best[:, 1]

    job = make_job(6, (1, 3), 2, all_grids(("block_output",), 1, 6), target=8)
    with_own = [
        ENGINES[engine](tiny_anatomy(family), replace(job, metrics=(("margin", margin),)), lambda: None)
        for engine in ("reference", "wavefront", "rows")
    ]
    for found in with_own:
        assert found.names[-1] == "margin"
        assert (found.of("margin") >= 0).all()
        np.testing.assert_allclose(found.of("margin"), with_own[0].of("margin"), atol=1e-5)


def test_a_metric_that_gives_no_number_a_row_is_refused_by_name(family):
    job = make_job(6, (1, 3), 2, all_grids(("block_output",), 1, 6))
    wrong = replace(job, metrics=(("mine", lambda logits, read: logits.mean()),))
    with pytest.raises(PlanError, match=r"metric 'mine' gave a tensor of shape \(\) for \d+ rows"):
        ENGINES["wavefront"](tiny_anatomy(family), wrong, lambda: None)


def test_tables_of_answers_are_as_wide_as_the_largest_set():
    jobs = [make_job(5, target=None), make_job(5, target=(4, 5), foil=(1, 2, 3))]
    targets, foils = answer_tables(jobs)
    np.testing.assert_array_equal(targets, [[NONE, NONE], [4, 5]])
    np.testing.assert_array_equal(foils, [[NONE] * 3, [1, 2, 3]])
