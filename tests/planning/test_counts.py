"""What experiments cost, in rows and token-blocks, to the last one: beside noise on a subject, pairs, severed paths,
ablations and sets of positions."""

import pytest

from fasttrace.experiment.cells import CLEAN, CORRUPTED, RUNS, STREAMS, ZERO, Edit, EditsIn, grid_cells
from fasttrace.planning.cost import UnitWork, cost_of
from fasttrace.planning.edits import CLEAN_CELL, CORRUPTED_CELL, Shape
from fasttrace.planning.plan import plan_cells

SUBJECT = Shape(48, 7, (0, 5), 1)
"""GPT-2 XL and a short prompt that begins with its subject."""


def counted(shape, cells):
    """(rows, token-blocks, token-blocks of one whole row a cell)."""
    unit = UnitWork((0,) * shape.n_layers, (0,) * shape.n_layers, 0, 0)
    cost = cost_of(plan_cells(shape, tuple(cells)), unit)
    return cost.rows, pytest.approx(cost.token_blocks, abs=0.5), cost.full_token_blocks


@pytest.mark.parametrize("background", RUNS)
@pytest.mark.parametrize(
    ("layers", "positions", "begin", "rows", "blocks"), [(12, 15, 10, 167, 2824.7), (30, 14, 9, 437, 19189.7)]
)
def test_a_pair_that_differs_late_costs_a_thirtieth_in_either_direction(
    background, layers, positions, begin, rows, blocks
):
    source = CORRUPTED if background == CLEAN else CLEAN
    cells = [
        EditsIn(background, tuple(edit._replace(source=source) for edit in cell))
        for stream in STREAMS
        for cell in grid_cells(stream, 1, layers, positions)
    ]
    expected = rows, blocks, 3.0 * (layers * positions) ** 2
    assert counted(Shape(layers, positions, (begin, begin + 1), 1), cells) == expected


@pytest.mark.parametrize(
    ("layers", "positions", "site", "rows", "blocks"),
    [
        (12, 15, "mlp_output", 166, 7205.3),
        (12, 15, "attention_output", 166, 7316),
        (30, 14, "mlp_output", 407, 44051.3),
        (30, 14, "attention_output", 407, 44322.7),
    ],
)
def test_ablating_a_module_at_each_place_costs_a_quarter(layers, positions, site, rows, blocks):
    cells = [EditsIn(CLEAN, (Edit(site, layer, p, ZERO),)) for layer in range(layers) for p in range(positions)]
    assert counted(Shape(layers, positions, (positions, positions), 0), cells) == (
        rows,
        blocks,
        (layers * positions) ** 2,
    )


@pytest.mark.parametrize(
    ("severed", "blocks"),
    [(("mlp_output",), 25850), (("attention_output",), 30926), (("mlp_output", "attention_output"), 25850)],
)
@pytest.mark.parametrize("in_all_blocks", [False, True])
def test_severed_paths_cost_what_the_ordinary_grid_does(severed, blocks, in_all_blocks):
    cells = [
        (
            Edit("block_output", layer, position),
            *(
                Edit(site, later, position, CORRUPTED)
                for site in severed
                for later in range(0 if in_all_blocks else layer + 1, 48)
            ),
        )
        for layer in range(48)
        for position in range(7)
    ]
    assert counted(SUBJECT, cells) == (329, blocks, (48 * 7) ** 2)


def test_a_whole_subject_restored_costs_half():
    cells = [tuple(Edit("block_output", layer, p) for p in range(5)) for layer in range(48)]
    assert counted(SUBJECT, cells) == (47, 7708, 48 * 48 * 7)


@pytest.mark.parametrize(("hidden_is_all", "rows", "blocks"), [(True, 0, 0), (False, 11, 418)])
def test_all_positions_of_a_border_need_no_row_where_the_hidden_state_is_all(hidden_is_all, rows, blocks):
    shape = Shape(12, 7, (0, 5), 1, hidden_is_all=hidden_is_all)
    cells = tuple(tuple(Edit("block_output", layer, p) for p in range(7)) for layer in range(12))
    assert counted(shape, cells) == (rows, blocks, 12 * 12 * 7)
    if hidden_is_all:
        noising = tuple(EditsIn(CLEAN, tuple(edit._replace(source=CORRUPTED) for edit in cell)) for cell in cells)
        assert set(plan_cells(shape, cells).cell_row) == {CLEAN_CELL}
        assert set(plan_cells(shape, noising).cell_row) == {CORRUPTED_CELL}


def test_what_attention_never_carries_on_is_the_background():
    cells = [
        (
            Edit("attention_output", layer, 4),
            *(Edit("attention_output", later, p, CORRUPTED) for later in range(layer + 1, 48) for p in range(7)),
        )
        for layer in range(47)
    ]
    assert counted(SUBJECT, cells)[:2] == (0, 0)


def test_a_value_that_is_overwritten_later_counts_for_nothing_at_its_place():
    shape = SUBJECT._replace(hidden_is_all=True)
    cells = ((Edit("block_output", 3, 6), Edit("block_output", 9, 6)), (Edit("block_output", 9, 6),))
    assert plan_cells(shape, cells).cell_row.tolist() == [0, 0]


def test_reads_before_the_last_position_keep_their_own_rows():
    shape = SUBJECT._replace(reads=(3, 6))
    cells = [(Edit("mlp_output", 47, p),) for p in range(7)]
    plan = plan_cells(shape, tuple(cells))
    assert (plan.cell_row >= 0).tolist() == [p in (3, 6) for p in range(7)]
    assert plan.read_tokens.shape == (2, 1, 2)
    # What a row does not hold of its own is read from its base row.
    origin = plan.blocks[-1].origin
    assert (origin[plan.read_tokens].T % 7 == [3, 6]).all()
    last = (
        tuple((Edit("block_output", 47, p),) for p in (3, 6)),
        ((Edit("block_output", 47, 3), Edit("block_output", 47, 6)),),
    )
    assert plan_cells(shape, (*last[0], *last[1])).cell_row.tolist() == [0, 1, CLEAN_CELL]
