"""The planner: exact counts, and what each pass may and may not drop."""

import doctest
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrace.errors import PlanError
from fasttrace.experiment.cells import STREAMS, Edit, grid_cells, window_of, windows_of
from fasttrace.planning.cost import UnitWork, cost_of, full_cost
from fasttrace.planning.edits import CLEAN_CELL, CORRUPTED_CELL, Shape
from fasttrace.planning.plan import plan_cells


def figure(n_layers, n_positions, begin, samples=1, window=10, layout="narrow"):
    """The plan of the three-stream figure."""
    cells = tuple(
        cell
        for stream, width in windows_of(STREAMS, window).items()
        for cell in grid_cells(stream, width, n_layers, n_positions)
    )
    return plan_cells(Shape(n_layers, n_positions, (begin, begin + 1), samples), cells, layout)


def cost(plan):
    n_layers = plan.shape.n_layers
    return cost_of(plan, UnitWork((0,) * n_layers, (0,) * n_layers, 0, 0))


def rectangles(plan):
    """[block] (first, stop) -> restored rows that hold these positions."""
    counts = []
    for block in plan.blocks:
        held = Counter()
        for group in block.groups:
            held[group.first, group.stop] += len(group.base) * group.tile_rows - group.has_base_rows * plan.n_base
        counts.append({positions: count for positions, count in held.items() if count})
    return counts


@pytest.mark.parametrize(
    ("n_layers", "n_positions", "begin", "suffix", "narrow"),
    [(12, 7, 0, 3.51, 3.83), (48, 7, 0, 3.25, 3.32), (30, 11, 1, 3.99, 4.13), (48, 25, 8, 7.54, 7.72)],
)
def test_the_figure_saves_the_counted_token_blocks(n_layers, n_positions, begin, suffix, narrow):
    for layout, saving in (("suffix", suffix), ("narrow", narrow)):
        counted = cost(figure(n_layers, n_positions, begin, layout=layout))
        assert counted.full_token_blocks == 3 * (n_layers * n_positions) ** 2
        assert counted.full_token_blocks / counted.token_blocks == pytest.approx(saving, abs=0.005)


@pytest.mark.parametrize(("layout", "token_blocks"), [("suffix", 6026), ("narrow", 5522)])
def test_token_blocks_of_the_12_block_figure_are_exact(layout, token_blocks):
    assert cost(figure(12, 7, 0, layout=layout)).token_blocks == pytest.approx(token_blocks)


def test_cost_is_linear_in_samples():
    one, ten = cost(figure(12, 7, 2, samples=1)), cost(figure(12, 7, 2, samples=10))
    assert ten.rows == 10 * one.rows
    assert ten.token_blocks == pytest.approx(10 * one.token_blocks)


def test_full_rows_cost_what_their_tokens_say():
    plan = figure(6, 5, 1, layout="full")
    assert all(block.n_tokens % 5 == 0 for block in plan.blocks)
    assert cost(plan).token_blocks == sum(block.n_tokens - 2 * 5 for block in plan.blocks)


def test_windows_are_centred_and_clipped():
    assert list(window_of(20, 10, 48)) == list(range(15, 25))
    assert list(window_of(0, 10, 48)) == [0, 1, 2, 3, 4]
    assert list(window_of(47, 10, 48)) == list(range(42, 48))
    assert list(window_of(5, 3, 48)) == [4, 5, 6]
    assert list(window_of(5, 1, 48)) == [5]


def test_cells_before_the_subject_take_the_corrupted_score():
    plan = figure(6, 7, 3)
    rows = plan.cell_row.reshape(3, 6, 7)
    assert (rows[:, :, :3] == CORRUPTED_CELL).all()
    assert (rows[1:, :5, 3:] >= 0).all()


def test_the_last_column_of_the_residual_stream_needs_no_row():
    rows = figure(6, 7, 0).cell_row.reshape(3, 6, 7)[0]
    assert (rows[-1, :-1] == CORRUPTED_CELL).all()
    assert rows[-1, -1] == CLEAN_CELL
    assert (rows[:-1] >= 0).all()


def test_the_last_block_counts_only_at_the_last_position():
    shape = Shape(4, 5, (0, 2), 1)
    cells = tuple((Edit("attention_output", 3, position),) for position in range(5))
    assert (plan_cells(shape, cells).cell_row >= 0).tolist() == [False] * 4 + [True]


def test_equal_cells_share_a_row():
    shape = Shape(4, 5, (0, 2), 1)
    cell = (Edit("mlp_output", 1, 2), Edit("mlp_output", 2, 2))
    same = (Edit("mlp_activation", 2, 2), Edit("mlp_activation", 1, 2), Edit("mlp_output", 1, 2))
    plan = plan_cells(shape, (cell, same))
    assert plan.cell_row.tolist() == [0, 0]


def test_cells_share_a_row_until_their_edits_differ():
    shape = Shape(4, 5, (0, 2), 1)
    first, second = Edit("mlp_output", 0, 2), Edit("mlp_output", 2, 2)
    plan = plan_cells(shape, ((first,), (first, second)))
    assert rectangles(plan) == [{(2, 3): 1}, {(2, 5): 1}, {(2, 5): 1, (2, 3): 1}, {(2, 5): 2}]


@pytest.mark.parametrize("site", ["mlp_output", "attention_output"])
@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        # One edit: its position alone, then all later ones.
        (([(1, 2)],), [{}, {(2, 3): 1}, {(2, 5): 1}, {(2, 5): 1}]),
        # All between the first and the last edited position.
        (([(1, 1), (1, 3)],), [{}, {(1, 4): 1}, {(1, 5): 1}, {(1, 5): 1}]),
        # A row that is edited again is not forked again.
        (([(1, 2), (2, 2)],), [{}, {(2, 3): 1}, {(2, 5): 1}, {(2, 5): 1}]),
        # Of two rows with one parent the one with the later edit is narrow and ends with it.
        (([(0, 2), (1, 1)], [(0, 2), (1, 3)]), [{(2, 3): 1}, {(1, 5): 1, (2, 4): 1}, {(1, 5): 1, (2, 5): 1}]),
        # Edited before the position that the other row begins with.
        (([(0, 3)], [(0, 3), (1, 1)]), [{(3, 4): 1}, {(3, 5): 1, (1, 2): 1}, {(3, 5): 1, (1, 5): 1}]),
    ],
)
def test_a_row_holds_its_edited_positions_alone_where_it_is_forked(site, edits, expected):
    cells = tuple(tuple(Edit(site, *place) for place in cell) for cell in edits)
    plan = plan_cells(Shape(4, 5, (0, 2), 1), cells)
    assert rectangles(plan)[: len(expected)] == expected


def test_rows_that_come_into_a_block_edited_are_whole():
    restored = (Edit("block_output", 0, 2),)
    both = (Edit("block_output", 0, 2), Edit("mlp_output", 1, 2))
    plan = plan_cells(Shape(4, 5, (0, 2), 1), (restored, both))
    assert rectangles(plan) == [{}, {(2, 5): 2}, {(2, 5): 2}, {(2, 5): 2}]


def test_embeddings_differ_only_inside_the_subject():
    shape = Shape(3, 4, (1, 2), 1)
    cells = tuple((Edit("block_input", 0, position),) for position in range(4))
    assert (plan_cells(shape, cells).cell_row >= 0).tolist() == [False, True, False, False]


def test_copying_the_corrupted_value_onto_itself_is_dropped():
    shape = Shape(3, 4, (1, 2), 1)
    frozen = (Edit("mlp_output", 1, 2, "corrupted"),)
    severed = (Edit("block_output", 0, 1), *frozen)
    assert plan_cells(shape, (frozen, severed)).cell_row.tolist() == [CORRUPTED_CELL, 0]


def test_replaced_and_unread_mlp_outputs_are_not_computed():
    shape = Shape(3, 4, (0, 1), 1)
    plan = plan_cells(shape, ((Edit("mlp_output", 1, 1),),))
    kept = [
        block.n_tokens - (block.n_tokens if block.mlp_keep is None else len(block.mlp_keep)) for block in plan.blocks
    ]
    assert kept == [0, 1, 2], "one replaced in block 1; two of three tokens unread in the last block"


@settings(max_examples=80, deadline=None)
@given(
    n_layers=st.integers(1, 6),
    n_positions=st.integers(1, 8),
    samples=st.integers(1, 3),
    window=st.integers(1, 4),
    data=st.data(),
)
def test_tables_of_any_figure_are_well_formed(n_layers, n_positions, samples, window, data):
    begin = data.draw(st.integers(0, n_positions - 1))
    plan = figure(n_layers, n_positions, begin, samples, window, data.draw(st.sampled_from(["narrow", "suffix"])))
    previous = (1 + samples) * n_positions
    for block in plan.blocks:
        assert block.source is None or (block.source.min() >= 0 and block.source.max() < previous)
        assert block.n_tokens == sum(len(g.base) * g.tile_rows * (g.stop - g.first) for g in block.groups)
        assert [g.start for g in block.groups] == sorted({g.start for g in block.groups})
        for to, taken_from in ((write.to, write.taken_from) for write in block.writes):
            assert len(set(to.tolist())) == len(to)
            assert (taken_from < (1 + samples) * n_positions).all()
            assert (to >= (1 + samples) * n_positions).all()
            assert (block.origin[to] % n_positions == taken_from % n_positions).all()
        previous = block.n_tokens
    assert len(np.unique(plan.last_tokens)) == plan.last_tokens.size
    assert (plan.blocks[-1].origin[plan.last_tokens] % n_positions == n_positions - 1).all()


def test_a_plan_is_made_once_per_shape():
    assert figure(5, 4, 0) is figure(5, 4, 0)


def test_the_reference_costs_one_full_row_per_cell():
    counted = full_cost(Shape(4, 5, (0, 1), 2), 10, UnitWork((2,) * 4, (4,) * 4, 1, 7))
    assert (counted.rows, counted.token_blocks) == (20, 400)
    assert counted.flops == 23 * (4 * (5 * 6 + 15) + 7)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ((Edit("block_output", 4, 0),), "layers 0..3"),
        ((Edit("block_output", 0, -1),), "positions 0..4"),
        ((Edit("residual", 0, 0),), "unknown site 'residual'"),
        ((Edit("mlp_output", 0, 0, "noise"),), "unknown source 'noise'"),
        ((Edit("mlp_output", 0, 1), Edit("mlp_output", 0, 1, "corrupted")), "keep one of them"),
    ],
)
def test_an_edit_that_makes_no_sense_is_an_error(cells, message):
    with pytest.raises(PlanError, match=message):
        plan_cells(Shape(4, 5, (0, 2), 1), (cells,))


@pytest.mark.parametrize(
    "shape", [Shape(0, 5, (0, 1), 1), Shape(4, 5, (2, 2), 1), Shape(4, 5, (3, 6), 1), Shape(4, 5, (0, 1), -1)]
)
def test_a_shape_without_anything_to_trace_is_an_error(shape):
    with pytest.raises(PlanError, match=r"trace|span"):
        plan_cells(shape, ())


@pytest.mark.parametrize(
    ("streams", "window", "message"),
    [
        (("residual",), 10, "unknown stream 'residual'; choose from block_input"),
        ((), 10, "no stream"),
        (("mlp_output", "mlp_output"), 10, "twice"),
        (("mlp_output",), 0, "window is 0"),
        (("mlp_output",), 2.5, "window is 2.5"),
    ],
)
def test_streams_and_windows_that_make_no_sense_are_errors(streams, window, message):
    with pytest.raises(PlanError, match=message):
        windows_of(streams, window)


def test_the_worked_plan_of_the_documentation_is_what_the_planner_makes():
    page = Path(__file__).parents[2] / "docs" / "planner.md"
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert (failed, tried > 10) == (0, True)
