"""Counterfactual prompts in place of noise, an answer to compare with, and cells of the user's own."""

import logging

import numpy as np
import pytest

import fasttrace
from fasttrace import PlanError, PromptError
from fasttrace.errors import UnequalLengthsError
from fasttrace.experiment.cells import ZERO
from fasttrace.experiment.own_cells import own_cells
from tests.helpers.tracers import tracer_with_text

PROMPT = "When John and Mary went to the shops, John gave the bag to"
OTHER = "When John and Mary went to the shops, Mary gave the bag to"
PAIR = {"counterfactual": OTHER, "target": " Mary", "foil": " John"}
IDS, OTHER_IDS = [5, 9, 13, 21, 34, 55], [5, 9, 14, 21, 35, 55]
EFFECTS = {
    **{
        ("block_output", layer, 9): effect
        for layer, effect in zip(
            (0, 5, 10, 15, 20, 25, 29), (7.280, 7.321, 7.355, 7.322, 5.030, -0.043, 0.0), strict=True
        )
    },
    **{
        ("block_output", layer, 13): effect
        for layer, effect in zip(
            (0, 5, 10, 15, 20, 25, 29), (0.004, -0.006, -0.009, -0.104, 2.340, 6.695, 7.278), strict=True
        )
    },
    ("attention_output", 23, 13): 5.749,
    ("attention_output", 20, 13): 1.882,
    ("attention_output", 24, 13): -1.638,
    ("attention_output", 17, 9): 1.002,
    ("mlp_output", 0, 9): 7.302,
    ("mlp_output", 26, 13): 0.918,
    ("mlp_output", 21, 9): 0.886,
    ("mlp_output", 29, 13): 0.790,
}
"""Computed by plain hooks, one forward pass a cell: effects on logit(" Mary") - logit(" John")."""


@pytest.fixture(scope="module")
def smollm2():
    return fasttrace.Tracer.from_pretrained("smollm2", cpu_matmul="mkl")


def test_the_effects_of_a_pair_are_those_of_plain_hooks(smollm2):
    frame = smollm2.sweep(PROMPT, list(EFFECTS), **PAIR)
    assert frame["logit_diff_effect"].to_numpy() == pytest.approx(list(EFFECTS.values()), abs=2e-3)
    assert frame.attrs["runs"]["clean"]["logit_diff"] == pytest.approx(3.1214, abs=2e-3)
    assert frame.attrs["runs"]["corrupted"]["logit_diff"] == pytest.approx(-4.1569, abs=2e-3)
    assert frame.attrs["runs"]["clean"]["kl"] == pytest.approx(0, abs=1e-6)
    swapped = smollm2.sweep(PROMPT, list(EFFECTS), counterfactual=OTHER, target=" John", foil=" Mary")
    np.testing.assert_allclose(swapped["logit_diff_effect"], -frame["logit_diff_effect"], atol=1e-4)


def test_a_trace_of_a_pair_says_what_was_compared(smollm2):
    result = smollm2.trace(PROMPT, streams=("block_output",), **PAIR)
    assert result.clean_prob == pytest.approx(0.8419, abs=1e-3)
    assert result.span == (9, 10)
    assert result.windows == {"block_output": 1}
    about = result.metadata
    assert (about["counterfactual"], about["differing"], about["samples"]) == ([OTHER], [9], 1)
    assert about["counterfactual_tokens"][0][9].strip() == "Mary"
    assert "noise" not in about
    assert "sigma" not in about
    grid = result.grid("block_output")
    assert grid[0, :9] == pytest.approx(np.full(9, result.corrupted_prob))  # before the first difference nothing moves
    assert grid[-1, -1] == pytest.approx(result.clean_prob)


def test_unequal_tokenizations_are_refused_with_both_side_by_side(smollm2):
    with pytest.raises(UnequalLengthsError) as raised:
        smollm2.trace(PROMPT, counterfactual=PROMPT.replace("John gave", "Annabelle gave"))
    first, above, below = str(raised.value).splitlines()
    assert first.startswith("the counterfactual has 16 tokens and the prompt 14")
    assert "' John'" in above
    assert "' Ann' 'ab' 'elle'" in below
    bars = [[place for place, letter in enumerate(line) if letter == "|"] for line in (above, below)]
    assert bars[0] == bars[1]


@pytest.mark.parametrize("engine", ["wavefront", "fork", "rows"])
def test_every_engine_traces_pairs_as_the_reference_does(engine):
    tracer = tracer_with_text()
    options = {"counterfactual": [OTHER_IDS, [5, 9, 14, 21, 34, 60]], "target": 7, "foil": 8}
    cells = [
        {"edits": [("mlp_output", 1, 2), ("attention_output", 0, -1)], "kind": "two", "number": 1},
        {"edits": [("block_output", 1, 4)], "kind": "one", "number": 2},
        {"edits": [], "kind": "none", "number": 3},
    ]
    found, expected = (tracer.sweep(IDS, cells, engine=name, **options) for name in (engine, "reference"))
    assert list(found["kind"]) == ["two", "one", "none"]
    for name in ("prob", "logit_diff", "kl", "log_prob"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)
        assert found[f"{name}_effect"][2] == pytest.approx(0, abs=1e-6)
    traced = tracer.trace(IDS, engine=engine, **options)
    plain = tracer.trace(IDS, engine="reference", **options)
    for stream in traced.streams:
        np.testing.assert_allclose(traced.grid(stream), plain.grid(stream), atol=1e-6)


def test_several_counterfactuals_are_averaged():
    tracer = tracer_with_text()
    others = [OTHER_IDS, [5, 9, 14, 21, 34, 60]]
    together = tracer.trace(IDS, counterfactual=others, target=7)
    alone = [tracer.trace(IDS, counterfactual=each, target=7) for each in others]
    for stream in together.streams:
        mean = np.mean([result.grid(stream) for result in alone], axis=0)
        np.testing.assert_allclose(together.grid(stream), mean, atol=1e-6)
    assert together.metadata["differing"] == [2, 4, 5]


def test_a_counterfactual_equal_to_the_prompt_is_warned_of_and_every_cell_is_the_baseline(caplog):
    with caplog.at_level(logging.WARNING, "fasttrace"):
        result = tracer_with_text().trace(IDS, counterfactual=IDS, target=7)
    assert "equal to the prompt: every cell is the baseline" in caplog.text
    assert result.corrupted_prob == pytest.approx(result.clean_prob)
    for stream in result.streams:
        np.testing.assert_allclose(result.grid(stream), result.clean_prob, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, PromptError, "neither subject nor counterfactual is given"),
        ({"counterfactual": []}, PromptError, "counterfactual is empty"),
        ({"counterfactual": " "}, PromptError, "counterfactual is .*empty"),
        ({"counterfactual": 3.5}, PromptError, "counterfactual is 3.5: expected a text"),
        ({"counterfactual": OTHER_IDS[:-1]}, UnequalLengthsError, "has 5 tokens and the prompt 6"),
        ({"counterfactual": [*OTHER_IDS[:-1], 10**6]}, PromptError, "counterfactual has token id 1000000"),
        ({"counterfactual": OTHER_IDS, "target": 7, "foil": 7}, PromptError, "foil 7 and target are the same token"),
        ({"counterfactual": OTHER_IDS, "foil": 10**6}, PromptError, "foil is 1000000; give text, or a token id"),
        ({"counterfactual": OTHER_IDS, "foil": ""}, PromptError, "foil: the target is empty"),
    ],
)
def test_a_pair_that_is_none_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        tracer_with_text().trace(IDS, **options)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([], "cells is empty"),
        (3, "cells is 3: expected a list of cells"),
        ([("mlp", 0, 0)], r"cells\[0\], edit 0, has the unknown site 'mlp'; choose from"),
        ([("mlp_output", 0, 0, "noisy")], "unknown source 'noisy'; choose from clean, corrupted"),
        ([("mlp_output", 9, 0)], r"cells\[0\], edit 0, layer is 9"),
        ([("mlp_output", 0, 6)], r"cells\[0\], edit 0, position is 6"),
        ([("mlp_output", 0, -7)], r"position is -7"),
        ([("mlp_output", 0)], "expected an edit such as"),
        ([[("mlp_output", 0, 1), ("mlp_output", 0, -5)]], r"cells\[0\] writes \('mlp_output', 0, 1\) twice"),
        ([{"head": 3}], "it has no 'edits'"),
        ([{"edits": [], "prob": 3}], "a coordinate named 'prob': give another name"),
    ],
)
def test_cells_that_are_none_are_refused(cells, message):
    with pytest.raises(PlanError, match=message):
        own_cells(cells, n_layers=4, n_positions=6)


def test_noising_asks_what_is_necessary():
    """Corrupted values in the clean run; all of the last state gives the corrupted run's own metrics."""
    last = ("block_output", 3, -1)
    cells = [
        {"edits": [(*last, "corrupted")], "background": "clean"},
        {"edits": [last], "background": "corrupted"},
        {"edits": [("mlp_output", 1, 2, ZERO)], "background": "clean"},
    ]
    options = {"counterfactual": OTHER_IDS, "target": 7, "foil": 8}
    tracer = tracer_with_text()
    cells = [
        {**cell, "edits": [(s, min(x, tracer.anatomy.n_layers - 1), *r) for s, x, *r in cell["edits"]]}
        for cell in cells
    ]
    frame, plain = (tracer.sweep(IDS, cells, engine=name, **options) for name in ("auto", "reference"))
    gap = frame.attrs["runs"]["clean"]["logit_diff"] - frame.attrs["runs"]["corrupted"]["logit_diff"]
    assert frame["logit_diff_effect"][:2].to_numpy() == pytest.approx([-gap, gap], abs=1e-5)
    np.testing.assert_allclose(frame["logit_diff_effect"], plain["logit_diff_effect"], atol=1e-5)
    assert list(frame["background"]) == ["clean", "corrupted", "clean"]


def test_cells_may_be_given_in_any_form():
    edit = fasttrace.experiment.cells.Edit("mlp_output", 1, 2)
    forms = [edit, ("mlp_output", np.int64(1), 2), [edit], [("mlp_output", 1, -4)], {"edits": edit, "name": "a"}]
    coordinates, cells = own_cells(forms, n_layers=4, n_positions=6)
    assert set(cells) == {(edit,)}
    with pytest.raises(PlanError, match=r"cells\[0\] has the unknown background 'noisy'"):
        own_cells([{"edits": edit, "background": "noisy"}], n_layers=4, n_positions=6)
    assert coordinates[0] == {"site": "mlp_output", "layer": 1, "position": 2}
    assert coordinates[-1] == {"name": "a"}
