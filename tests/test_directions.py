"""Clean values in the corrupted run, or corrupted ones in the clean run: what is sufficient, and what is necessary."""

import numpy as np
import pytest

import fasttrace
from fasttrace import PlanError
from fasttrace.experiment.cells import EditsIn, background_of, grid_cells
from fasttrace.experiment.grids import directed
from tests.helpers.run_facts import facts_of
from tests.helpers.tracers import PROMPT, tracer_with_text

IDS, OTHER_IDS = [5, 9, 13, 21, 34, 55], [5, 9, 14, 21, 35, 55]
ANSWERS = {"target": 7, "foil": 8}
NOISE = {"subject": "The Space Needle", "noise": 1.0, "samples": 2}


@pytest.mark.parametrize("engine", ["reference", "rows", "fork", "wavefront"])
def test_denoising_a_prompt_is_noising_its_counterfactual(engine):
    tracer = tracer_with_text()
    denoised = tracer.trace(IDS, counterfactual=OTHER_IDS, engine=engine, **ANSWERS)
    noised = tracer.trace(OTHER_IDS, counterfactual=IDS, engine=engine, direction="noising", **ANSWERS)
    assert (denoised.direction, denoised.background) == ("denoising", "corrupted")
    assert (noised.direction, noised.background) == ("noising", "clean")
    for metric in ("prob", "log_prob", "logit", "logit_diff", "prob_diff", "rank", "top1"):  # kl is from the clean run
        for stream in denoised.streams:
            np.testing.assert_array_equal(denoised.grid(stream, metric), noised.grid(stream, metric), err_msg=metric)
        assert denoised.gap(metric) == noised.gap(metric)


@pytest.mark.parametrize("engine", ["rows", "fork", "wavefront"])
def test_noising_with_noise_is_the_references(engine):
    found, plain = (
        tracer_with_text().trace(PROMPT, engine=name, direction="noising", **NOISE) for name in (engine, "reference")
    )
    for stream in found.streams:
        np.testing.assert_allclose(found.grid(stream), plain.grid(stream), atol=1e-6)
    assert found.grid("block_output")[-1, -1] == pytest.approx(found.corrupted_prob)
    assert found.grid("block_output")[-1, 0] == pytest.approx(found.clean_prob)
    assert found.gap() == pytest.approx(found.corrupted_prob - found.clean_prob)


def test_both_directions_take_one_pass_and_are_each_as_alone():
    tracer = tracer_with_text()
    both = tracer.trace_both(IDS, counterfactual=OTHER_IDS, **ANSWERS)
    for direction, found in both._asdict().items():
        alone = tracer.trace(IDS, counterfactual=OTHER_IDS, direction=direction, **ANSWERS)
        assert found.direction == direction
        assert found.clean_prob == pytest.approx(alone.clean_prob)
        for stream in alone.streams:
            np.testing.assert_allclose(found.grid(stream), alone.grid(stream), atol=1e-6)
            np.testing.assert_allclose(
                found.grid(stream, "normalized_effect", metric="logit_diff"),
                alone.grid(stream, "normalized_effect", metric="logit_diff"),
                atol=1e-4,
            )
    assert both.denoising.cost == both.noising.cost
    assert both.denoising.cost.rows > tracer.trace(IDS, counterfactual=OTHER_IDS, **ANSWERS).cost.rows


def test_a_run_and_its_folder_are_of_one_direction(tmp_path):
    tracer, options = tracer_with_text(), {"noise": 1.0, "samples": 1, "window": 2}
    outcome = tracer.run(facts_of(2), tmp_path / "run", direction="noising", **options)
    assert outcome.store.fingerprint["direction"] == "noising"
    expected = list(tracer.trace_many(facts_of(2), direction="noising", **options))
    found = {record.fact.id: record.result for record in outcome.store.records()}
    for record in expected:
        assert found[record.fact.id].direction == "noising"
        for stream in record.result.streams:
            np.testing.assert_array_equal(found[record.fact.id].grid(stream), record.result.grid(stream))
    assert fasttrace.average(outcome.store, bootstrap=0).direction == "noising"
    with pytest.raises(fasttrace.StoreError, match=r"direction .*noising"):
        tracer.run(facts_of(2), tmp_path / "run", **options)


def test_a_direction_that_is_none_is_refused():
    with pytest.raises(PlanError, match=r"unknown direction 'both': give one of denoising, noising.*trace_both"):
        tracer_with_text().trace(IDS, counterfactual=OTHER_IDS, direction="both")


def test_romes_files_have_no_noising(tmp_path):
    result = tracer_with_text().trace(PROMPT, direction="noising", **NOISE)
    with pytest.raises(PlanError, match="direction is noising: ROME's files"):
        result.save_rome_npz(tmp_path / "a.npz", "block_output")


def test_cells_are_turned_round():
    cells = grid_cells("mlp_output", 3, 4, 5)
    turned = directed(cells, "noising")
    assert directed(cells, "denoising") is cells
    assert {background_of(cell) for cell in turned} == {"clean"}
    assert all(isinstance(cell, EditsIn) for cell in turned)
    assert {edit.source for cell in turned for edit in cell} == {"corrupted"}
    assert [[edit[:3] for edit in cell] for cell in turned] == [[edit[:3] for edit in cell] for cell in cells]
