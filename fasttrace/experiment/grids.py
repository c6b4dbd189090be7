"""Grids: how the cells of a trace are made from its settings. Nothing here imports torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fasttrace.checks import items, one_of, shown, whole_number
from fasttrace.errors import PlanError
from fasttrace.experiment.cells import (
    CLEAN,
    CORRUPTED,
    Cell,
    Edit,
    EditsIn,
    Vector,
    stream_names,
    window_of,
    window_width,
)
from fasttrace.experiment.sites import SITE
from fasttrace.memories import remembered

__all__ = [
    "BACKGROUNDS",
    "DENOISING",
    "DIRECTIONS",
    "NOISING",
    "OF_A_SUBJECT",
    "POSITIONS",
    "Grid",
    "directed",
    "direction_name",
]

POSITIONS = ("each", "all", "subject", "subject_last", "last")
"""Names of columns: every position by itself; and one column of all of them, the subject's, its last one, the last."""

OF_A_SUBJECT = ("subject", "subject_last")
"""Those that a prompt without a subject has not."""

Column = int | tuple[int, ...]
Source = Callable[[str, int], Vector]
"""(stream, block) -> what is written there."""

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


@dataclass(frozen=True)
class Grid:
    """Cells of every block and every column of positions, for `Tracer.sweep`.

    Attributes:
        streams: sites, one or several; None: those of the figure that the model has.
        window: blocks whose values are replaced together, one width or several; the residual stream has but width 1.
        positions: one of `POSITIONS`, or a list of columns, each a position or a list of them; negative ones count from
            the prompt's end.
        direction: one of `DIRECTIONS`.
        source: what is written, in the clean run; None: values of the other run, by the direction.

    Raises:
        PlanError: one that cannot be used, whatever the prompt; it names it.
    """

    streams: Any = None
    window: Any = 1
    positions: Any = "each"
    direction: str = DENOISING
    source: Source | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        checked = {
            "streams": None if self.streams is None else stream_names(self.streams),
            "window": _widths(self.window),
            "positions": _columns_of(self.positions),
            "direction": direction_name(self.direction),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def sourced(self, source: Source) -> "Grid":
        """The same with given values in place of another run's."""
        return replace(self, source=source)

    def cells(
        self, n_layers: int, n_positions: int, span: tuple[int, int], streams: Sequence[str]
    ) -> tuple[list[dict[str, Any]], tuple[Cell, ...]]:
        """The coordinates stream, window, layer and position of all cells, and the cells, in this order.

        Args:
            n_layers: of the model.
            n_positions: of the prompt.
            span: its subject's positions, half open.
            streams: where the grid names none.

        Raises:
            PlanError: a position outside the prompt, or one that is named twice.
        """
        columns = _columns(self.positions, n_positions, span)
        coordinates: list[dict[str, Any]] = []
        found: list[Cell] = []
        for stream in self.streams or streams:
            for width in self.window if SITE[stream].windowed else (1,):
                for layer in range(n_layers):
                    blocks = window_of(layer, width, n_layers)
                    for name, column in columns.items():
                        coordinates.append({"stream": stream, "window": width, "layer": layer, "position": name})
                        found.append(self._cell(stream, blocks, column))
        return coordinates, tuple(found)

    def _cell(self, stream: str, blocks: range, column: Sequence[int]) -> Cell:
        places = [(stream, block, position) for position in column for block in blocks]
        if self.source is not None:
            return EditsIn(CLEAN, tuple(Edit(*place, self.source(*place[:2])) for place in places))
        return directed((tuple(Edit(*place) for place in places),), self.direction)[0]


def _widths(window: Any) -> tuple[int, ...]:
    listed = isinstance(window, list | tuple | range)
    widths = tuple(window_width(width) for width in (window if listed else (window,)))
    if not widths:
        raise PlanError("window is empty: give a width, or several")
    if len(set(widths)) < len(widths):
        raise PlanError(f"window has a width that is given twice in {widths}; name each once")
    return widths


def _columns_of(positions: Any) -> str | tuple[Column, ...]:
    expected = f"one of {', '.join(POSITIONS)}, or a list of columns, each a position or a list of positions"
    if isinstance(positions, str):
        if positions not in POSITIONS:
            raise PlanError(f"unknown positions {shown(positions)}: give {expected}")
        return str.__str__(positions)
    given = items("positions", positions, expected)
    if not given:
        raise PlanError(f"positions is empty: give {expected}")
    return tuple(_column(f"positions[{number}]", column) for number, column in enumerate(given))


def _column(name: str, column: Any) -> Column:
    try:
        return whole_number(name, column)
    except PlanError:
        if isinstance(column, float | str):
            raise
    found = tuple(whole_number(name, position) for position in items(name, column, "a position or a list of them"))
    if not found:
        raise PlanError(f"{name} is empty: give a position or a list of them")
    return found


def _columns(
    positions: str | tuple[Column, ...], n_positions: int, span: tuple[int, int]
) -> dict[int | str, tuple[int, ...]]:
    """Column by name: a position's own number, or what a set is called."""
    if positions == "each":
        return {position: (position,) for position in range(n_positions)}
    if isinstance(positions, str):
        named = {
            "all": range(n_positions),
            "subject": range(*span),
            "subject_last": (span[1] - 1,),
            "last": (n_positions - 1,),
        }
        return {positions: tuple(named[positions])}
    columns: dict[int | str, tuple[int, ...]] = {}
    for number, column in enumerate(positions):
        name = f"positions[{number}]"
        given = (column,) if isinstance(column, int) else column
        found = [whole_number(name, each, -n_positions, n_positions - 1) % n_positions for each in given]
        twice = next((each for place, each in enumerate(found) if each in found[:place]), None)
        if twice is not None:
            raise PlanError(f"{name} has position {twice} twice: name it once")
        called = found[0] if len(found) == 1 else ",".join(map(str, found))
        if called in columns:
            raise PlanError(f"{name} is the column {called} again: name it once")
        columns[called] = tuple(found)
    return columns
