"""Grids: how the cells of a trace are made from its settings. Nothing here imports torch."""

from typing import Any

from fasttrace.checks import one_of
from fasttrace.errors import PlanError
from fasttrace.experiment.cells import CLEAN, CORRUPTED, Cell, EditsIn
from fasttrace.memories import remembered

__all__ = ["BACKGROUNDS", "DENOISING", "DIRECTIONS", "NOISING", "directed", "direction_name"]

DENOISING, NOISING = DIRECTIONS = ("denoising", "noising")
BACKGROUNDS = {DENOISING: CORRUPTED, NOISING: CLEAN}
"""The run that edits are made in. Denoising puts clean values into the corrupted run and asks what is sufficient for
the answer; noising puts corrupted values into the clean run and asks what is necessary for it."""


def direction_name(value: Any) -> str:
    """One of `DIRECTIONS`.

    Raises:
        PlanError: it is none.
    """
    try:
        return one_of("direction", value, DIRECTIONS)
    except PlanError as error:
        raise PlanError(f"{error}; Tracer.trace_both gives both, from one pass") from None


@remembered(256, about="plans")
def directed(cells: tuple[Cell, ...], direction: str) -> tuple[Cell, ...]:
    """Cells that put back clean values, as they are or turned round.

    Args:
        cells: such as those of `grid_cells`.
        direction: one of `DIRECTIONS`.
    """
    if direction == DENOISING:
        return cells
    return tuple(EditsIn(CLEAN, tuple(edit._replace(source=CORRUPTED) for edit in cell)) for cell in cells)
