"""Every engine that claims a family gives the reference's grids; broken on purpose, it does not."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from fasttrace.engines import ENGINES, reference
from fasttrace.engines import self_check as select
from fasttrace.engines.job import Job
from fasttrace.errors import FasttraceError
from fasttrace.experiment.cells import RUNS, ZERO, Edit, EditsIn, grid_cells
from fasttrace.experiment.corruption import Counterfactual, draw, sigma_of
from fasttrace.models.anatomy import anatomy_of
from tests.helpers import zoo
from tests.helpers.families import IN_EARLY_5, MUTATIONS, best_engine, family_model, skip_if_capless

NOT_IN_FLOAT64 = {
    "xglm": "its attention clamps scores to the smallest float32",
    "gemma2": "its attention takes softmax in float32",
    "deepseek_v3": "its router is in float32, with rounding that depends on the CPU",
    "mamba": "its recurrence is in float32",
    **({"mpt": "its mask is of float32's least number"} if IN_EARLY_5 else {}),
}


@cache
def case(name, dtype=torch.float32):
    """(anatomy, job of all streams and cells, what plain forward passes give)."""
    anatomy = anatomy_of(family_model(name, dtype))
    ids = torch.randint(1, 60, (7,), generator=torch.Generator().manual_seed(3))
    sigma = sigma_of("s3", anatomy.embedding, [ids.tolist()], anatomy.device)
    cells = tuple(cell for stream in anatomy.streams for cell in grid_cells(stream, 3, anatomy.n_layers, 7))
    noise = draw((2, 4), anatomy.d_model, sigma=sigma, samples=2, seed=1, neutral=anatomy.neutral_token)
    job = Job(ids, noise, cells, None)
    return anatomy, job, reference.run(anatomy, job, lambda: None, rows=len(cells) * 2)


def noise_of(anatomy, job):
    return sigma_of("s3", anatomy.embedding, [job.token_ids.tolist()], anatomy.device)


def error_of(engine, name, dtype=torch.float32):
    """Largest difference from plain forward passes, over the spread of their grids."""
    anatomy, job, expected = case(name, dtype)
    scores = ENGINES[engine](anatomy, job, lambda: None)
    pairs = ((scores.cells, expected.cells), (scores.corrupted, expected.corrupted), (scores.clean, expected.clean))
    return max(np.abs(given - wanted).max() for given, wanted in pairs) / np.ptp(expected.cells)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*zoo.LISTED, *zoo.VARIANTS])
def test_engines_equal_plain_forward_passes_and_the_best_one_is_chosen(name):
    anatomy, _, expected = case(name)
    assert np.ptp(expected.cells) > 0.01, "the grids must vary, or the comparison says nothing"
    assert error_of(best_engine(name), name) < 1e-5
    assert error_of("rows", name) < 1e-5
    choice = select.choose(anatomy)
    assert choice.name == best_engine(name)
    assert choice.self_check_error < 1e-4


@pytest.mark.parametrize("name", zoo.LISTED)
@pytest.mark.parametrize("of", ["noise", "counterfactual"])
def test_either_direction_and_vectors_are_right_in_every_family(name, of):
    anatomy, job, _ = case(name)
    runs = job.runs
    if of == "counterfactual":
        other = [token + (2 <= at < 5) for at, token in enumerate(job.token_ids.tolist())]
        runs = Counterfactual([other]).runs(job.token_ids.tolist(), (0, 1), anatomy)
    places = [(0, 0), (0, 2), (1, 4), (anatomy.n_layers - 1, 2), (anatomy.n_layers - 1, 6)]
    cells = [
        EditsIn(background, tuple(Edit(stream, min(layer + more, anatomy.n_layers - 1), at, source) for more in (0, 1)))
        for background in RUNS
        for source in (*RUNS, ZERO)
        for stream in anatomy.streams
        for layer, at in places
    ]
    job = Job(job.token_ids, runs, tuple(map(once, cells)), None)
    expected = reference.run(anatomy, job, lambda: None, rows=1000)
    for engine in {best_engine(name), "rows"}:
        scores = ENGINES[engine](anatomy, job, lambda: None)
        difference = np.abs(scores.cells - expected.cells).max() / np.ptp(expected.cells)
        assert difference < 1e-4, engine


def once(cell):
    """Without repeated edits."""
    return replace(cell, edits=tuple(dict.fromkeys(cell.edits)))


@pytest.mark.parametrize("name", [name for name in zoo.LISTED if name not in NOT_IN_FLOAT64])
def test_in_float64_the_best_engine_agrees_to_rounding(name):
    assert error_of(best_engine(name), name, torch.float64) < 1e-12


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3n_text", "mpt", "mamba", "opt-post-norm"])
def test_plain_passes_of_many_rows_are_those_of_one_row(name):
    anatomy, job, expected = case(name)
    few = Job(job.token_ids, job.runs, job.cells[::9], job.target)
    one_by_one = reference.run(anatomy, few, lambda: None)
    np.testing.assert_allclose(one_by_one.cells, expected.cells[::9], rtol=1e-4)
    np.testing.assert_allclose(one_by_one.corrupted, expected.corrupted, rtol=1e-4)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_breaking_one_thing_moves_the_grids_and_fails_the_self_check(mutation, monkeypatch):
    name, mutate = MUTATIONS[mutation]
    skip_if_capless(mutation)
    engine = best_engine(name)
    assert error_of(engine, name) < 1e-5
    mutate(monkeypatch)
    assert error_of(engine, name) > 1e-2
    choice = select.choose(anatomy_of(family_model(name)))
    assert choice.name != engine
    assert f"{engine} differs from plain forward passes by" in choice.reason


def test_rows_that_take_their_neighbors_state_are_noticed_in_a_recurrent_model(monkeypatch):
    from fasttrace.engines import rows

    monkeypatch.setattr(rows._Step, "_grow_hidden", lambda step, hidden: wrong(step, hidden))
    right = rows._Step.__dict__["_grow_hidden"]
    assert right is not None

    def wrong(step, hidden):
        source = step.tables.source
        grown = hidden if source is None else hidden.flatten(0, 1).index_select(0, source).unflatten(0, (-1, 7))
        return grown.roll(1, 0) if len(grown) > len(hidden) else grown

    assert error_of("rows", "mamba") > 1e-2


@pytest.mark.parametrize("name", ["bloom", "falcon-alibi", "mpt"])
def test_as_many_rows_as_heads_do_not_confuse_biases_with_rows(name):
    """With 3 noise samples there are 4 base rows, and the tiny models have 4 heads."""
    anatomy, job, _ = case(name)
    runs = draw((2, 4), anatomy.d_model, sigma=noise_of(anatomy, job), samples=3, seed=1)
    job = Job(job.token_ids, runs, job.cells, None)
    expected = reference.run(anatomy, job, lambda: None, rows=1000)
    for engine in ("fork", "rows"):
        scores = ENGINES[engine](anatomy, job, lambda: None)
        np.testing.assert_allclose(scores.cells, expected.cells, rtol=1e-4, err_msg=engine)


@pytest.mark.parametrize("name", ["llama", "gptj", "gemma3n_text", "bloom", "mpt", "falcon-alibi", "opt"])
@pytest.mark.parametrize("n_positions", [1, 4])
def test_prompts_as_long_as_there_are_heads_or_of_one_token_are_traced(name, n_positions):
    anatomy, job, _ = case(name)
    cells = tuple(cell for s in anatomy.streams for cell in grid_cells(s, 3, anatomy.n_layers, n_positions))
    runs = draw((0, 1), anatomy.d_model, sigma=noise_of(anatomy, job), samples=2, seed=1)
    job = Job(job.token_ids[:n_positions], runs, cells, None)
    expected = reference.run(anatomy, job, lambda: None, rows=1000)
    for engine in (best_engine(name), "rows"):
        scores = ENGINES[engine](anatomy, job, lambda: None)
        np.testing.assert_allclose(scores.cells, expected.cells, rtol=2e-4, err_msg=engine)


def test_a_family_whose_attention_cannot_be_forked_says_so():
    anatomy, job, _ = case("mamba")
    with pytest.raises(FasttraceError, match="MambaMixer takes no cache of earlier keys and values; use engine='rows'"):
        ENGINES["fork"](anatomy, job, lambda: None)
    with pytest.raises(FasttraceError, match="0 of 4 blocks attended through the pack; use engine='rows'"):
        ENGINES["wavefront"](anatomy, job, lambda: None)
