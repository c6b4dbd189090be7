"""Several prompts in one forward pass give what each gives alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrace import memories
from fasttrace.engines import reference, wavefront
from fasttrace.engines.job import Job, base_ids, pack_of_jobs
from fasttrace.experiment.cells import STREAMS, grid_cells
from fasttrace.models.anatomy import anatomy_of
from fasttrace.planning import packs
from fasttrace.planning.on_device import tables_of
from fasttrace.planning.packs import pack_of, peak_tokens
from fasttrace.planning.plan import plan_cells
from tests.conftest import N_LAYERS, all_grids, make_job, tiny_anatomy
from tests.helpers.families import OWN_ATTENTION, RECURRENT
from tests.helpers.zoo import LISTED, tiny_model

SHAPES = ((7, (1, 4), 2), (5, (0, 2), 1), (7, (1, 4), 2), (7, (3, 6), 1), (1, (0, 1), 1), (9, (2, 3), 3))


def job_of_shape(n_positions, span, samples, window=3, streams=STREAMS, **options):
    return make_job(n_positions, span, samples, all_grids(streams, window, n_positions), **options)


def grids_of(anatomy, n_positions):
    grids = (grid_cells(stream, 3, anatomy.n_layers, n_positions) for stream in anatomy.streams)
    return tuple(cell for grid in grids for cell in grid)


def plain(anatomy, job):
    return reference.run(anatomy, job, lambda: None, rows=1000)


def assert_same(scores, expected, tolerance):
    assert scores.target == expected.target
    for found, wanted in ((scores.cells, expected.cells), (scores.clean, expected.clean)):
        np.testing.assert_allclose(found, wanted, rtol=tolerance)
    np.testing.assert_allclose(scores.corrupted, expected.corrupted, rtol=tolerance)


def test_prompts_of_any_length_span_and_samples_share_a_pass(family):
    anatomy, jobs = tiny_anatomy(family), [job_of_shape(*shape) for shape in SHAPES]
    ticks = []
    together = wavefront.run_jobs(anatomy, jobs, lambda: ticks.append(1))
    assert len(ticks) == anatomy.n_layers
    for scores, job in zip(together, jobs, strict=True):
        assert_same(scores, plain(anatomy, job), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LISTED if name not in (*OWN_ATTENTION, *RECURRENT)])
def test_prompts_share_a_pass_in_every_family_of_the_wavefront(name):
    """Windows, soft caps, learnt and rotary positions, shared keys, latent attention, experts."""
    anatomy = anatomy_of(tiny_model(name))
    jobs = [
        Job(job.token_ids % 60 + 1, job.runs, grids_of(anatomy, len(job.token_ids)), None)
        for job in (make_job(*shape, d_model=anatomy.d_model) for shape in SHAPES)
    ]
    for scores, job in zip(wavefront.run_jobs(anatomy, jobs, lambda: None), jobs, strict=True):
        expected = plain(anatomy, job)
        spread = max(np.ptp(expected.cells), expected.cells.max() / 4)
        assert np.abs(scores.cells - expected.cells).max() < 1e-5 * spread
        np.testing.assert_allclose(scores.corrupted, expected.corrupted, rtol=1e-4, atol=1e-7)


def test_each_prompt_is_scored_for_its_own_target(family):
    anatomy = tiny_anatomy(family)
    jobs = [job_of_shape(6, (1, 3), 1, target=target) for target in (3, 11)]
    first, second = wavefront.run_jobs(anatomy, jobs, lambda: None)
    assert (first.target, second.target) == (3, 11)
    assert_same(second, plain(anatomy, jobs[1]), 1e-5)


def test_prompts_without_restored_rows_can_share_a_pass(family):
    anatomy = tiny_anatomy(family)
    jobs = [make_job(5, (0, 2), 1), job_of_shape(7, (1, 4), 1)]
    nothing, grids = wavefront.run_jobs(anatomy, jobs, lambda: None)
    assert nothing.cells.shape == (0, 1)
    assert_same(grids, plain(anatomy, jobs[1]), 1e-5)


def test_a_neighbour_with_a_wrong_token_is_noticed(family):
    """The comparison has teeth: a prompt's numbers are of its own tokens."""
    anatomy, jobs = tiny_anatomy(family), [job_of_shape(*shape) for shape in SHAPES[:2]]
    together = wavefront.run_jobs(anatomy, jobs[::-1], lambda: None)
    expected = plain(anatomy, jobs[0])
    assert together[0].cells.shape != expected.cells.shape
    assert_same(together[1], expected, 1e-5)


def test_short_prompts_are_filled_up_with_their_last_token():
    ids = base_ids([make_job(3, (0, 1), 1), make_job(5, (0, 1), 2)])
    assert ids.shape == (5, 5)
    assert torch.equal(ids[0, 2:], ids[0, 2].expand(3))


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 8), st.integers(1, 3), st.integers(1, 4)), min_size=2, max_size=5
    )
)
def test_tables_of_a_common_pack_are_well_formed(shapes):
    jobs = [
        job_of_shape(length, (min(begin, length - 1), length), samples, window)
        for length, begin, samples, window in shapes
    ]
    plans = [job.plan(N_LAYERS, wavefront.LAYOUT) for job in jobs]
    pack = pack_of(plans)
    n_previous = pack.n_base * pack.width
    for block in pack.blocks:
        assert_covers(block, pack)
        if block.source is not None:
            assert block.source.min() >= 0
            assert block.source.max() < n_previous
        if block.mlp_keep is not None:
            assert block.mlp_spread.max() < len(block.mlp_keep)
        n_previous = block.n_tokens
    assert max(block.n_tokens for block in pack.blocks) == peak_tokens(plans)
    assert len(pack.read_tokens) == sum(plan.last_tokens.size for plan in plans)


def assert_covers(block, pack):
    """The rectangles lie one after the other, each prompt length's base rows before all else of that length."""
    at, seen = 0, set()
    for group in block.groups:
        assert group.start == at
        if group.n_positions not in seen:
            assert group.has_base_rows
            assert group.base[: pack.base_rows[group.n_positions]].tolist() == list(
                range(pack.base_rows[group.n_positions])
            )
        seen.add(group.n_positions)
        at += len(group.base) * group.tile_rows * (group.stop - group.first)
    assert at == block.n_tokens == len(block.origin)


def test_a_single_plan_keeps_its_tables():
    job = job_of_shape(7, (1, 4), 2)
    plan = job.plan(N_LAYERS, wavefront.LAYOUT)
    assert pack_of_jobs([job], N_LAYERS, wavefront.LAYOUT).blocks is plan.blocks


def test_small_packs_are_kept_with_their_tables_and_large_ones_are_not(monkeypatch):
    jobs = [job_of_shape(length, (1, 4), 2) for length in (7, 9)]
    cpu = torch.device("cpu")
    first, again = (pack_of_jobs(jobs, N_LAYERS, wavefront.LAYOUT) for _ in range(2))
    assert first is again
    assert tables_of(first, cpu) is tables_of(again, cpu)
    assert pack_of_jobs(jobs[::-1], N_LAYERS, wavefront.LAYOUT) is not first
    before = tables_of(first, cpu)
    memories.clear("packs")
    assert tables_of(first, cpu) is not before
    monkeypatch.setattr(packs, "LARGEST_KEPT", 1)
    large = [pack_of_jobs(jobs, N_LAYERS, wavefront.LAYOUT) for _ in range(2)]
    assert large[0] is not large[1]
    assert tables_of(large[0], cpu) is not tables_of(large[0], cpu)


def test_equal_shapes_of_several_prompts_are_one_rectangle():
    """So that the number of attention calls does not grow with the number of prompts."""
    plan = plan_cells(make_job(7, (1, 4), 1).shape(N_LAYERS), all_grids(STREAMS, 3, 7))
    merged = pack_of([plan] * 4)
    for one, four in zip(plan.blocks, merged.blocks, strict=True):
        assert len(four.groups) == len(one.groups)
