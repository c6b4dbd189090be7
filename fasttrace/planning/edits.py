"""Cells to a table of the edits that matter: the planner's first three passes.

1. no-op edits: before the subject nothing differs between the runs, and embeddings differ only inside it;
2. dead edits: in the last block only the last position reaches the logits;
3. cells left without edits take the corrupted score, the last cell of the residual stream the clean one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fasttrace.errors import PlanError
from fasttrace.experiment.cells import SOURCES, Cell
from fasttrace.experiment.sites import RESIDUAL, SITE, SITES

CORRUPTED_CELL = -1
CLEAN_CELL = -2
"""Stand for the row of a cell whose score a base run gives."""


class Shape(NamedTuple):
    """What the planner has to know of a prompt and a model.

    Attributes:
        n_layers: blocks of the model.
        n_positions: tokens of the prompt.
        span: subject tokens, half open.
        samples: noise samples.
    """

    n_layers: int
    n_positions: int
    span: tuple[int, int]
    samples: int


@dataclass(frozen=True)
class EditTable:
    """Edits as columns, sorted by cell and, inside a cell, in the order in which the model reaches them.

    Attributes:
        cell: [edit] number of the cell.
        block: [edit] the block whose computation the edit changes; a block output belongs to the next block.
        stage: [edit] of its site: RESIDUAL, ATTENTION or MLP.
        position: [edit] token index.
        clean: [edit] taken from the clean run, else from the corrupted one.
        constant: [cell] CLEAN_CELL or CORRUPTED_CELL for cells that need no row, else 0.
    """

    cell: np.ndarray
    block: np.ndarray
    stage: np.ndarray
    position: np.ndarray
    clean: np.ndarray
    constant: np.ndarray

    def where(self, keep: np.ndarray | slice) -> "EditTable":
        """The edits that a mask, an index or a slice picks."""
        cell, block, stage, position, clean = self.cell, self.block, self.stage, self.position, self.clean
        return EditTable(cell[keep], block[keep], stage[keep], position[keep], clean[keep], self.constant)


def effective_edits(shape: Shape, cells: Sequence[Cell], mixes_last: bool = False) -> EditTable:
    """The edits that change a cell's logits, after passes 1 to 3.

    Args:
        shape: counts.
        cells: what to restore.
        mixes_last: attention and MLP outputs of the last block may reach the last position from others, because
            something in that block mixes tokens after them, as in some recurrent models.

    Raises:
        PlanError: a shape with nothing to trace, an edit outside the model or the prompt, or two edits of one
            cell that contradict each other.
    """
    _check_shape(shape)
    table = _sorted_once(_columns(shape, cells))
    table = _settle_last_block(shape, table, mixes_last)
    table = table.where(~_is_noop(shape, table))
    table = table.where(~_is_late_copy(table))
    constant = table.constant.copy()
    constant[np.setdiff1d(np.flatnonzero(constant == 0), table.cell)] = CORRUPTED_CELL
    return replace(table, constant=constant)


def _check_shape(shape: Shape) -> None:
    begin, end = shape.span
    if min(shape.n_layers, shape.n_positions, shape.samples) < 1:
        raise PlanError(f"{shape} has nothing to trace: layers, positions and samples must be >= 1")
    if not 0 <= begin < end <= shape.n_positions:
        raise PlanError(
            f"span {shape.span} does not cover tokens of a prompt of {shape.n_positions}: "
            f"give 0 <= begin < end <= {shape.n_positions}"
        )


def _columns(shape: Shape, cells: Sequence[Cell]) -> EditTable:
    cell = np.repeat(np.arange(len(cells)), [len(edits) for edits in cells])
    flat = [edit for edits in cells for edit in edits]
    sites, layers, positions, sources = zip(*flat, strict=True) if flat else ((), (), (), ())
    for word, known, what in ((sites, SITES, "site"), (sources, SOURCES, "source")):
        if unknown := set(word) - set(known):
            raise PlanError(f"unknown {what} {unknown.pop()!r} in a cell; choose from {', '.join(known)}")
    layer, position = np.array(layers, dtype=np.int64), np.array(positions, dtype=np.int64)
    for value, count, what in ((layer, shape.n_layers, "layer"), (position, shape.n_positions, "position")):
        if value.size and not 0 <= value.min() <= value.max() < count:
            bad = flat[int(np.flatnonzero((value < 0) | (value >= count))[0])]
            raise PlanError(f"{bad} is outside the sweep: it has {what}s 0..{count - 1}")
    block = layer + np.array([SITE[site].is_next_input for site in sites], dtype=np.int64)
    stage = np.array([SITE[site].stage for site in sites], dtype=np.int64)
    clean = np.array([source == "clean" for source in sources], dtype=bool)
    return EditTable(cell, block, stage, position, clean, np.zeros(len(cells), dtype=np.int64))


def _sorted_once(table: EditTable) -> EditTable:
    """Sorts, and drops repeated edits."""
    table = table.where(np.lexsort((table.position, table.stage, table.block, table.cell)))
    same = np.ones(max(0, len(table.cell) - 1), dtype=bool)
    for column in (table.cell, table.block, table.stage, table.position):
        same &= column[1:] == column[:-1]
    if np.any(same & (table.clean[1:] != table.clean[:-1])):
        cell = table.cell[1:][same][0]
        raise PlanError(f"cell {cell} restores one value from the clean and the corrupted run; keep one of them")
    return table.where(np.concatenate((np.ones(len(table.cell[:1]), dtype=bool), ~same)))


def _settle_last_block(shape: Shape, table: EditTable, mixes_last: bool) -> EditTable:
    """Pass 2, and the cells whose whole last state is replaced (pass 3)."""
    at_last_position = table.position == shape.n_positions - 1
    leaves_model = table.block == shape.n_layers
    settles = leaves_model & at_last_position
    constant = table.constant.copy()
    constant[table.cell[settles]] = np.where(table.clean[settles], CLEAN_CELL, CORRUPTED_CELL)
    in_last_block = (table.block == shape.n_layers - 1) & (table.stage != RESIDUAL) & (not mixes_last)
    is_dead = leaves_model | (in_last_block & ~at_last_position) | (constant[table.cell] != 0)
    return replace(table, constant=constant).where(~is_dead)


def _is_noop(shape: Shape, table: EditTable) -> np.ndarray:
    begin, end = shape.span
    is_embedding = (table.block == 0) & (table.stage == RESIDUAL)
    return (table.position < begin) | (is_embedding & (table.position >= end))


def _is_late_copy(table: EditTable) -> np.ndarray:
    """Edits that write the corrupted run's value where the row still has it: nothing before them reaches it."""
    noop = np.zeros(len(table.cell), dtype=bool)
    first_changed: dict[int, int] = {}
    for number in np.flatnonzero(np.isin(table.cell, table.cell[~table.clean])):
        cell, position = int(table.cell[number]), int(table.position[number])
        first = first_changed.get(cell)
        if not table.clean[number] and (first is None or position < first):
            noop[number] = True
        else:
            first_changed[cell] = position if first is None else min(first, position)
    return noop
