"""Grids whose columns are positions or sets of them, with windows of several widths, and ablations."""

import numpy as np
import pytest
import torch

import fasttrace
from fasttrace import PlanError, PromptError
from fasttrace.experiment.cells import ZERO, EditsIn, Vector, window_of
from fasttrace.experiment.grids import Grid
from tests.helpers.tracers import PROMPT, tracer_with_text

IDS, OTHER_IDS = [5, 9, 13, 21, 34, 55], [5, 9, 14, 21, 35, 55]
PAIR = {"counterfactual": OTHER_IDS, "target": 7, "foil": 8}


def test_a_grid_of_each_position_is_the_trace():
    tracer = tracer_with_text()
    for direction in ("denoising", "noising"):
        traced = tracer.trace(IDS, direction=direction, window=3, **PAIR)
        frame = tracer.sweep(IDS, Grid(window=3, direction=direction), **PAIR)
        assert list(frame.columns[:4]) == ["stream", "window", "layer", "position"]
        for stream in traced.streams:
            of_stream = frame[frame["stream"] == stream]
            for metric in ("prob", "logit_diff"):
                expected = traced.grid(stream, "indirect_effect", metric=metric).ravel()
                np.testing.assert_allclose(of_stream[f"{metric}_effect"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("positions", "columns"),
    [
        ("all", {"all": range(6)}),
        ("subject", {"subject": (1, 2)}),
        ("subject_last", {"subject_last": (2,)}),
        ("last", {"last": (5,)}),
        ([0, -1], {0: (0,), 5: (5,)}),
        ([[0, 2], 4, range(3, 5)], {"0,2": (0, 2), 4: (4,), "3,4": (3, 4)}),
        (np.array([1, 3]), {1: (1,), 3: (3,)}),
    ],
)
@pytest.mark.parametrize("engine", ["wavefront", "rows", "reference"])
def test_columns_are_sets_of_positions_and_windows_of_several_widths(positions, columns, engine):
    tracer, options = tracer_with_text(), {"subject": (1, 3), "noise": 1.0, "samples": 2, "engine": engine}
    grid = Grid(("mlp_output", "block_output"), window=(1, 3), positions=positions)
    found, layers = tracer.sweep(IDS, grid, **options), tracer.anatomy.n_layers
    cells = [
        [(stream, block, position) for position in column for block in window_of(layer, width, layers)]
        for stream, widths in (("mlp_output", (1, 3)), ("block_output", (1,)))
        for width in widths
        for layer in range(layers)
        for column in columns.values()
    ]
    expected = tracer.sweep(IDS, cells, **options)
    np.testing.assert_allclose(found["prob_effect"], expected["prob_effect"], atol=1e-6)
    assert list(dict.fromkeys(found["position"])) == list(columns)
    assert found.groupby("stream")["window"].unique().map(list).to_dict() == {
        "block_output": [1],
        "mlp_output": [1, 3],
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "subjects"}, "unknown positions 'subjects'"),
        ({"positions": []}, "positions is empty"),
        ({"positions": [[]]}, r"positions\[0\] is empty"),
        ({"positions": [0.5]}, r"positions\[0\] is 0.5"),
        ({"positions": {1, 2}}, "positions is {1, 2}, and a set has no order"),
        ({"window": []}, "window is empty"),
        ({"window": [1, 0]}, "window is 0"),
        ({"window": [3, 3]}, "window has a width that is given twice"),
        ({"streams": "mlp"}, "unknown stream 'mlp'"),
        ({"direction": "both"}, "unknown direction 'both'"),
    ],
)
def test_a_grid_that_is_none_is_refused_when_it_is_made(options, message):
    with pytest.raises(PlanError, match=message):
        Grid(**options)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([6], r"positions\[0\] is 6"),
        ([-7], r"positions\[0\] is -7"),
        ([[1, -5]], r"positions\[0\] has position 1 twice"),
        ([1, -5], r"positions\[1\] is the column 1 again"),
    ],
)
def test_positions_outside_the_prompt_are_refused(positions, message):
    with pytest.raises(PlanError, match=message):
        tracer_with_text().sweep(IDS, Grid("mlp_output", positions=positions), **PAIR)


# Ablations.


@pytest.mark.parametrize("engine", ["wavefront", "fork", "rows"])
def test_ablations_are_those_of_the_reference(engine):
    tracer = tracer_with_text()
    streams = ("mlp_output", "attention_output", "mlp_activation", "block_output")
    found, plain = (tracer.ablate(IDS, streams, target=7, foil=8, engine=name) for name in (engine, "reference"))
    assert len(found) == len(streams) * tracer.anatomy.n_layers * len(IDS)
    for name in ("prob_effect", "logit_diff_effect", "kl_effect"):
        np.testing.assert_allclose(found[name], plain[name], atol=1e-5)
    assert found["kl"].max() > 1e-4
    assert set(found.attrs["runs"]) == {"clean"}
    assert found.attrs["source"] == "zero"
    assert not {"noise", "sigma", "samples", "direction"} & set(found.attrs)


def test_an_ablation_is_what_a_hook_on_the_module_does():
    tracer = tracer_with_text()
    found = tracer.ablate(IDS, "mlp_output", positions="all", target=7)
    for layer, prob in enumerate(found["prob"]):
        handle = tracer.anatomy.modules_at("mlp_output")[layer].register_forward_hook(lambda _m, _i, out: out * 0)
        with torch.no_grad():
            logits = tracer.model(torch.tensor([IDS])).logits[0, -1]
        handle.remove()
        assert logits.softmax(-1)[7].item() == pytest.approx(prob, abs=1e-6)


def test_given_values_are_written_by_layer_and_stream():
    tracer = tracer_with_text()
    layers, width = tracer.anatomy.n_layers, tracer.anatomy.d_model
    values = torch.randn(layers, width, generator=torch.manual_seed(0))
    vectors = [Vector(row) for row in values]
    cells = [
        {"edits": [("mlp_output", layer, position, vectors[layer])], "background": "clean"}
        for layer in range(layers)
        for position in (2, 4)
    ]
    expected = tracer.sweep(IDS, cells, **PAIR)["logit_diff"]
    for source in (values, {"mlp_output": values}):
        found = tracer.ablate(IDS, "mlp_output", source=source, positions=[2, 4], target=7, foil=8)
        np.testing.assert_allclose(found["logit_diff"], expected, atol=1e-5)
    same = tracer.ablate(IDS, "mlp_output", source=values[0], positions=[2, 4], target=7, foil=8)
    np.testing.assert_allclose(same["logit_diff"][:2], expected[:2], atol=1e-5)


def test_a_models_own_values_change_nothing():
    """Its values of one position, written there again."""
    tracer, kept = tracer_with_text(), []
    modules = tracer.anatomy.modules_at("mlp_output")
    handles = [module.register_forward_hook(lambda _m, _i, out: kept.append(out[0, 3])) for module in modules]
    with torch.no_grad():
        tracer.model(torch.tensor([IDS]))
    for handle in handles:
        handle.remove()
    found = tracer.ablate(IDS, "mlp_output", source=torch.stack(kept), positions=[3], target=7)
    np.testing.assert_allclose(found["prob_effect"], 0, atol=1e-7)
    np.testing.assert_allclose(found["kl"], 0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source": "one"}, PlanError, "source is 'one': expected \"zero\", a tensor"),
        ({"source": 3}, PlanError, "source is 3"),
        ({"source": torch.zeros(3)}, PlanError, r"source for mlp_output has shape \[3\]: give \[\d+\] or"),
        ({"source": torch.zeros(9, 32)}, PlanError, r"source for mlp_output has shape \[9, 32\]"),
        ({"source": {"block_output": torch.zeros(3)}}, PlanError, "source has no values for mlp_output"),
        ({"source": torch.tensor([True])}, PlanError, "source for mlp_output"),
        ({"positions": "subject"}, PromptError, "positions is 'subject' and no subject is given"),
        ({"positions": [9]}, PlanError, r"positions\[0\] is 9"),
        ({"window": 0}, PlanError, "window is 0"),
    ],
)
def test_an_ablation_that_is_none_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        tracer_with_text().ablate(IDS, "mlp_output", **options)


def test_values_that_are_not_finite_are_refused():
    tracer = tracer_with_text()
    with pytest.raises(PlanError, match="source for mlp_output has values that are not finite"):
        tracer.ablate(IDS, "mlp_output", source=torch.full((tracer.anatomy.d_model,), torch.nan))


def test_a_stream_that_the_model_has_not_is_refused():
    from tests.helpers.zoo import tiny_model

    with pytest.raises(fasttrace.ModelError, match="mlp_activation"):
        fasttrace.Tracer(tiny_model("mixtral")).ablate(IDS, "mlp_activation")


def test_a_subject_is_a_column_of_an_ablation():
    tracer = tracer_with_text()
    found = tracer.ablate(PROMPT, "mlp_output", subject="The Space Needle", positions="subject_last")
    assert set(found["position"]) == {"subject_last"}
    assert len(found) == tracer.anatomy.n_layers


def test_grids_of_vectors_are_cells_in_the_clean_run():
    grid = Grid("mlp_output", positions="all").sourced(lambda _stream, _layer: ZERO)
    coordinates, cells = grid.cells(2, 3, (0, 1), ())
    assert coordinates[0] == {"stream": "mlp_output", "window": 1, "layer": 0, "position": "all"}
    assert all(isinstance(cell, EditsIn) and cell.background == "clean" for cell in cells)
    assert {edit.source for cell in cells for edit in cell} == {ZERO}
