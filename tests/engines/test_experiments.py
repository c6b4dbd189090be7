"""Any base runs, any background, any source: every engine gives the reference's numbers, and identities hold."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrace.engines import ENGINES
from fasttrace.engines.job import Job
from fasttrace.errors import PlanError
from fasttrace.experiment.cells import CLEAN, CORRUPTED, RUNS, SITES, STREAMS, ZERO, Edit, EditsIn, Vector, grid_cells
from fasttrace.experiment.corruption import Counterfactual, EmbeddingsReplaced, NoCorruption, Noise
from tests.conftest import FAMILIES, N_LAYERS, all_grids, tiny_anatomy

PACKED = ("wavefront", "fork", "rows")
PROMPT = (5, 9, 13, 21, 34, 55, 60)
T = len(PROMPT)
LAST = T - 1


def other_prompt(begin, end=None):
    """The prompt with other tokens in a span."""
    end = begin + 1 if end is None else end
    return tuple(token + 1 if begin <= at < end else token for at, token in enumerate(PROMPT))


def job_of(family, corruption, cells, span=(1, 3), target=11, prompt=PROMPT):
    runs = corruption.runs(prompt, span, tiny_anatomy(family))
    return Job(torch.tensor(prompt), runs, tuple(cells), target)


def run(engine, family, job):
    return ENGINES[engine](tiny_anatomy(family), job, lambda: None)


def assert_all_equal(family, job, tolerance=1e-5):
    expected = run("reference", family, job)
    for engine in PACKED:
        scores = run(engine, family, job)
        for given_, wanted in ((scores.cells, expected.cells), (scores.clean, expected.clean)):
            np.testing.assert_allclose(given_, wanted, rtol=tolerance, err_msg=engine)
        np.testing.assert_allclose(scores.corrupted, expected.corrupted, rtol=tolerance, err_msg=engine)
    return expected


def within(background, cells):
    return tuple(EditsIn(background, tuple(cell)) for cell in cells)


def noising(cells):
    """The cells with the runs exchanged."""
    return within(CLEAN, [[edit._replace(source=CORRUPTED) for edit in cell] for cell in cells])


CORRUPTIONS = {
    "noise": Noise(1.0, samples=2),
    "uniform": Noise(1.0, samples=3, distribution="uniform"),
    "noise alone": Noise(1.0, samples=1, replaces=True),
    "one counterfactual": Counterfactual([other_prompt(3)]),
    "two counterfactuals": Counterfactual([other_prompt(3), other_prompt(2, 5)]),
    "at the last token": Counterfactual([other_prompt(LAST)]),
    "the prompt itself": Counterfactual([PROMPT]),
    "zero": EmbeddingsReplaced("zero"),
    "mean": EmbeddingsReplaced("mean"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_both_directions_of_every_corruption_equal_the_reference(family, name):
    cells = all_grids(STREAMS, 3, T)
    expected = assert_all_equal(family, job_of(family, CORRUPTIONS[name], (*cells, *noising(cells))))
    if name != "the prompt itself":
        assert expected.cells[: len(cells)].std() > 1e-4
        assert expected.cells[len(cells) :].std() > 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_denoising_is_noising_with_the_prompts_exchanged(family, engine):
    """S1."""
    other, cells = other_prompt(3, 5), all_grids(STREAMS, 2, T)
    forth = run(engine, family, job_of(family, Counterfactual([other]), cells))
    back = run(engine, family, job_of(family, Counterfactual([PROMPT]), noising(cells), prompt=other))
    np.testing.assert_allclose(forth.cells, back.cells, rtol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("hidden_is_all", [False, True])
def test_all_positions_at_one_border_are_the_source(family, engine, hidden_is_all):
    """S2, and S3: all embeddings that differ."""
    whole = [[Edit("block_output", layer, p) for p in range(T)] for layer in range(N_LAYERS)]
    embeddings = [[Edit("block_input", 0, p) for p in (1, 2)]]
    cells = (*whole, *embeddings)
    job = job_of(family, Noise(1.0, samples=2), (*map(tuple, cells), *noising(cells)))
    scores = run(engine, family, replace(job, hidden_is_all=hidden_is_all))
    n = len(cells)
    np.testing.assert_allclose(scores.cells[:n], np.full((n, 2), scores.clean[11]), rtol=1e-5)
    np.testing.assert_allclose(scores.cells[n:], np.tile(scores.corrupted[:, 11], (n, 1)), rtol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_counterfactual_that_is_the_prompt_changes_nothing(family, engine):
    """S4: to the last bit where no row is needed."""
    cells = all_grids(STREAMS, 2, T)
    scores = run(engine, family, job_of(family, Counterfactual([PROMPT]), (*cells, *noising(cells))))
    np.testing.assert_allclose(scores.cells, scores.clean[11], rtol=0 if engine in PACKED else 1e-5)


@pytest.mark.parametrize("engine", PACKED)
def test_cells_before_the_first_difference_are_the_background(family, engine):
    """S5."""
    cells = [cell for cell in all_grids(STREAMS, 2, T) if cell[0].position < 3]
    scores = run(engine, family, job_of(family, Counterfactual([other_prompt(3)]), (*cells, *noising(cells))))
    assert (scores.cells[: len(cells)] == scores.corrupted[0, 11]).all()
    assert (scores.cells[len(cells) :] == scores.clean[11]).all()


def own_value(family, site, layer, position, ids=PROMPT):
    """What a site has in a plain pass."""
    from fasttrace.experiment.sites import SITE
    from fasttrace.models.hooks import hidden_hook, output_hook

    anatomy, found = tiny_anatomy(family), []
    hook = hidden_hook if SITE[site].side == "input" else output_hook
    with hook(anatomy.modules_at(site)[layer], lambda hidden: found.append(hidden.reshape(len(ids), -1).clone())):
        anatomy.model(input_ids=torch.tensor([ids]))
    return Vector(found[0][position].detach())


@pytest.mark.parametrize("site", SITES)
def test_a_runs_own_values_as_vectors_change_nothing(family, site):
    """A1: the mean over the prompt itself. A5: the clean run's values in the clean run."""
    places = [(0, 0), (1, 3), (N_LAYERS - 1, LAST), (2, LAST)]
    cells = [[Edit(site, *place, source=own_value(family, site, *place))] for place in places]
    cells += [[Edit(site, *place)] for place in places]
    for engine in PACKED:
        scores = run(engine, family, job_of(family, NoCorruption(), within(CLEAN, cells)))
        np.testing.assert_allclose(scores.cells, scores.clean[11], rtol=1e-5, err_msg=engine)


@pytest.mark.parametrize("site", SITES)
def test_vectors_equal_the_reference_at_every_place(family, site):
    generator = torch.Generator().manual_seed(2)
    width = len(own_value(family, site, 0, 0).values)
    vector = Vector(torch.randn(width, generator=generator))
    for corruption in (NoCorruption(), Noise(1.0, samples=2)):
        backgrounds = (CLEAN, CORRUPTED) if corruption.n_runs else (CLEAN,)
        cells = [
            (background, [edit._replace(source=source) for edit in cell])
            for background in backgrounds
            for source in (vector, ZERO)
            for cell in grid_cells(site, 2, N_LAYERS, T)
        ]
        expected = assert_all_equal(family, job_of(family, corruption, [EditsIn(b, tuple(c)) for b, c in cells]))
        assert expected.cells.std() > 1e-4


def test_zero_attention_in_all_blocks_is_a_model_without_attention(family):
    """A3."""
    from fasttrace.models.hooks import output_hook

    anatomy = tiny_anatomy(family)
    cell = tuple(Edit("attention_output", layer, p, ZERO) for layer in range(N_LAYERS) for p in range(T))
    job = job_of(family, NoCorruption(), [EditsIn(CLEAN, cell)])
    from contextlib import ExitStack

    with ExitStack() as stack:
        for module in anatomy.modules_at("attention_output"):
            stack.enter_context(output_hook(module, torch.zeros_like))
        expected = anatomy.model(input_ids=torch.tensor([PROMPT])).logits[0, -1].softmax(-1)[11].item()
    for engine in ENGINES:
        assert run(engine, family, job).cells[0, 0] == pytest.approx(expected, rel=1e-5)


def test_the_last_state_may_be_a_vector(family):
    vector = Vector(torch.randn(32, generator=torch.Generator().manual_seed(3)))
    cells = [(Edit("block_output", N_LAYERS - 1, p, source),) for p in (2, LAST) for source in (vector, ZERO)]
    assert_all_equal(family, job_of(family, Noise(1.0, samples=2), (*cells, *within(CLEAN, cells))))


@pytest.mark.parametrize("cell", [(Edit("mlp_output", 1, 2, CORRUPTED),), ()])
@pytest.mark.parametrize("engine", PACKED)
def test_a_corrupted_run_where_there_is_none_is_an_error(engine, cell):
    cells = [cell] if not cell else [EditsIn(CLEAN, cell)]
    with pytest.raises(PlanError, match="and there is none"):
        run(engine, "gpt2", job_of("gpt2", NoCorruption(), cells))


@pytest.mark.parametrize("engine", PACKED)
def test_a_vector_of_another_width_is_an_error(engine):
    cell = EditsIn(CLEAN, (Edit("mlp_output", 1, 2, Vector(torch.zeros(5))),))
    with pytest.raises(PlanError, match="5 numbers where the model has 32 units"):
        run(engine, "gpt2", job_of("gpt2", NoCorruption(), [cell]))


@st.composite
def experiments(draw):
    family = draw(st.sampled_from(FAMILIES))
    corruption = CORRUPTIONS[draw(st.sampled_from(sorted(CORRUPTIONS)))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    wide = {"mlp_activation": len(own_value(family, "mlp_activation", 0, 0).values)}
    vectors = {site: Vector(torch.randn(wide.get(site, 32), generator=generator)) for site in SITES}
    places = st.tuples(st.sampled_from(SITES), st.integers(0, N_LAYERS - 1), st.integers(0, LAST))
    cells = []
    for _ in range(draw(st.integers(0, 6))):
        cell = {}
        for site, layer, position in draw(st.lists(places, max_size=8)):
            place = {"block_input": 0, "block_output": 0, "attention_output": 1}.get(site, 2)
            source = draw(st.sampled_from([*RUNS, ZERO, vectors[site]]))
            cell[layer + (site == "block_output"), place, position] = Edit(site, layer, position, source)
        if draw(st.booleans()):  # a whole state, or attention that is overwritten everywhere
            site, source = draw(st.sampled_from(["block_output", "attention_output"])), draw(st.sampled_from(RUNS))
            for position in range(draw(st.integers(0, 3)), T):
                layer = draw(st.sampled_from([1, N_LAYERS - 1]))
                place = layer + (site == "block_output"), int(site == "attention_output"), position
                cell[place] = Edit(site, layer, position, source)
        cells.append(EditsIn(draw(st.sampled_from(RUNS)), tuple(cell.values())))
    job = job_of(family, corruption, cells)
    reads = tuple(sorted(draw(st.sets(st.integers(0, LAST), min_size=1, max_size=3))))
    target = tuple(range(7, 7 + len(reads)))
    return family, replace(job, reads=reads, target=target, hidden_is_all=draw(st.booleans()))


@settings(max_examples=60, deadline=None)
@given(experiment=experiments())
def test_any_experiment_equals_the_reference(experiment):
    assert_all_equal(*experiment)


def test_prompts_with_and_without_vectors_share_a_pass(family):
    from fasttrace.engines.wavefront import run_jobs

    vector, wide = Vector(torch.ones(32)), own_value(family, "mlp_activation", 0, 3)
    plain = all_grids(STREAMS, 2, T)
    given_ = [(Edit(site, 1, 3, source),) for site, source in (("mlp_output", vector), ("mlp_activation", wide))]
    given_ += [(Edit("block_output", N_LAYERS - 1, LAST, vector),), (Edit("block_output", 0, 2, vector),)]
    jobs = [
        job_of(family, Noise(1.0, samples=2), plain),
        job_of(family, NoCorruption(), within(CLEAN, given_)),
        job_of(family, Counterfactual([other_prompt(3)]), (*noising(plain), *given_)),
        job_of(family, Counterfactual([other_prompt(2)[:5]]), noising(all_grids(STREAMS, 2, 5)), prompt=PROMPT[:5]),
    ]
    for order in (jobs, jobs[::-1]):
        for job, scores in zip(order, run_jobs(tiny_anatomy(family), order, lambda: None), strict=True):
            np.testing.assert_allclose(scores.cells, run("reference", family, job).cells, rtol=1e-5)


def test_ablations_run_in_several_passes_without_any_corrupted_run(family):
    from fasttrace.engines.memory import Budget
    from fasttrace.engines.passes import run_in_passes

    cells = within(CLEAN, [[edit._replace(source=ZERO) for edit in cell] for cell in all_grids(STREAMS, 2, T)])
    job = job_of(family, NoCorruption(), cells)
    whole, _ = run_in_passes(ENGINES["wavefront"], tiny_anatomy(family), job, Budget(10**6))
    parts, _ = run_in_passes(ENGINES["wavefront"], tiny_anatomy(family), job, Budget(150))
    np.testing.assert_allclose(parts.cells, whole.cells, rtol=1e-5)
    assert set(whole.top) == {"clean"}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_answer_of_several_tokens_is_scored_as_it_is_written(family, engine):
    """Teacher forcing: read at the last token of the prompt and at all but the last of the answer."""
    cells = all_grids(STREAMS, 2, T)
    reads, answer = (4, 5, 6), (PROMPT[5], PROMPT[6], 11)
    job = replace(job_of(family, Noise(1.0, samples=2), cells), reads=reads, target=answer)
    scores = run(engine, family, job)
    probs = tiny_anatomy(family).model(input_ids=torch.tensor([PROMPT])).logits[0].softmax(-1)
    expected = np.prod([probs[read, token].item() for read, token in zip(reads, answer, strict=True)])
    assert scores.base_of("prob")[0] == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(np.exp(scores.of("log_prob")), scores.cells, rtol=1e-4)
    np.testing.assert_allclose(scores.clean, probs[4].detach(), rtol=1e-4)
    # An edit behind a read cannot change what is read there.
    late = replace(job, cells=((Edit("block_output", 1, 6),),))
    at_last = replace(late, reads=(6,), target=(11,))
    before = replace(late, cells=(), reads=(4, 5), target=answer[:2])
    first = run(engine, family, before).base_of("prob")[1:]
    np.testing.assert_allclose(
        run(engine, family, late).cells[0], first * run(engine, family, at_last).cells[0], rtol=1e-4
    )


def test_prompts_that_are_read_at_other_places_share_a_pass(family):
    from fasttrace.engines.wavefront import run_jobs

    cells = all_grids(STREAMS, 2, T)
    job = job_of(family, Noise(1.0, samples=2), cells)
    short = job_of(family, Noise(1.0, samples=1), all_grids(STREAMS, 2, 4), prompt=PROMPT[:4])
    jobs = [
        replace(job, reads=(4, 5, 6), target=(1, 2, 3)),
        job,
        replace(short, reads=(1, 3), target=None),
        replace(job, reads=(2,), target=5),
    ]
    for each, scores in zip(jobs, run_jobs(tiny_anatomy(family), jobs, lambda: None), strict=True):
        expected = run("reference", family, each)
        assert scores.targets == expected.targets
        np.testing.assert_allclose(scores.table, expected.table, rtol=1e-4, atol=1e-6)


def test_an_answer_needs_a_token_for_each_read():
    with pytest.raises(PlanError, match="read at 2 positions has 3 tokens"):
        replace(job_of("gpt2", NoCorruption(), ()), reads=(1, 2), target=(1, 2, 3))
