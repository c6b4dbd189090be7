"""Cells: what a sweep asks for, one set of edits per square of a grid.

A cell says which values of a run are overwritten, and with what. It knows nothing of models; the planner compiles
cells, the reference engine reads them as they are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from fasttrace.checks import items, shown, whole_number
from fasttrace.errors import PlanError
from fasttrace.experiment.sites import SITE, SITES
from fasttrace.memories import remembered

if TYPE_CHECKING:
    from torch import Tensor

CLEAN, CORRUPTED = RUNS = ("clean", "corrupted")
"""Runs that values are taken from, and that cells are made in: run 0, and the corrupted run of the same number."""

STREAMS: tuple[str, ...] = ("block_output", "mlp_activation", "attention_output")
"""The three streams of the paper's figure, in its order."""

MOST_BLOCKS = 2**31 - 1
"""Widest window; one wider than the model is clipped to it."""


@dataclass(frozen=True, eq=False)
class Vector:
    """A value that is given, such as a mean over other prompts; equal to itself alone: make it once and use it often.

    Attributes:
        values: [width of the site] numbers, converted to the model's dtype; None: zeros.
    """

    values: "Tensor | None" = None


ZERO = Vector()
"""Zeros, as wide as any site."""


class Edit(NamedTuple):
    """One write in a restored run: the value at (site, layer, position) is replaced by the source's.

    Attributes:
        site: a component, by pyvene's names; `mlp_activation` is the input of the MLP's down projection.
        layer: block index, from 0.
        position: token index, from 0.
        source: "clean" (run 0), "corrupted" (the corrupted run of the same number, nothing restored), or a vector.
    """

    site: str
    layer: int
    position: int
    source: str | Vector = CLEAN


@dataclass(frozen=True)
class EditsIn:
    """A cell with a background of its own.

    Attributes:
        background: the run in which the edits are made: "corrupted" to ask what is sufficient (denoising), "clean"
            to ask what is necessary (noising, ablation).
        edits: what is overwritten.
    """

    background: str
    edits: tuple[Edit, ...]

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __len__(self) -> int:
        return len(self.edits)


Cell = tuple[Edit, ...] | EditsIn
"""The edits of one restored run; a plain tuple is made in the corrupted run."""


def background_of(cell: Cell) -> str:
    """The run in which a cell's edits are made."""
    return cell.background if isinstance(cell, EditsIn) else CORRUPTED


def window_of(layer: int, width: int, n_layers: int) -> range:
    """Blocks restored together around `layer`: centred, clipped to the model, half open.

    >>> window_of(20, 10, 48)
    range(15, 25)
    >>> window_of(0, 10, 48)
    range(0, 5)

    Source: Meng et al. (2022), appendix B.1, and the code published with it.
    """
    return range(max(0, layer - width // 2), min(n_layers, layer - (-width // 2)))


def windows_of(streams: Sequence[str], window: int) -> dict[str, int]:
    """Width per stream: the residual stream is restored in single blocks, the others in windows.

    Raises:
        PlanError: an unknown, repeated or missing stream, or a width below 1.
    """
    names, width = stream_names(streams), window_width(window)
    return {name: width if SITE[name].windowed else 1 for name in names}


def stream_names(streams: str | Sequence[str]) -> tuple[str, ...]:
    """One or more sites, each named once.

    Raises:
        PlanError: an unknown, repeated or missing one.
    """
    names = [streams] if isinstance(streams, str) else items("streams", streams, "a list of names")
    if not names:
        raise PlanError(f"streams is {shown(streams)}: no stream given; choose one or more of {', '.join(SITES)}")
    known = tuple(_site(name) for name in names)
    if len(set(known)) < len(known):
        raise PlanError(f"streams has a stream that is given twice in {known}; name each once")
    return known


def _site(name: Any) -> str:
    if not isinstance(name, str) or name not in SITES:
        raise PlanError(f"unknown stream {shown(name)}; choose from {', '.join(SITES)} for streams")
    return str.__str__(name)


def window_width(window: int) -> int:
    """A window's width.

    Raises:
        PlanError: it is no whole number, or below 1.
    """
    return whole_number("window", window, 1, MOST_BLOCKS, meaning="blocks restored together; 1 restores single blocks")


@remembered(256, about="plans")
def grid_cells(stream: str, window: int, n_layers: int, n_positions: int) -> tuple[Cell, ...]:
    """The cells of one grid, layer by layer: cell (l, p) is item `l * n_positions + p`."""
    columns = [tuple(Edit(stream, block, position) for block in range(n_layers)) for position in range(n_positions)]
    windows = (window_of(layer, window, n_layers) for layer in range(n_layers))
    return tuple(column[blocks.start : blocks.stop] for blocks in windows for column in columns)
