"""Cells: what a sweep asks for, one set of edits per square of a grid.

A cell says which values of the corrupted run are overwritten, and with what. It knows nothing of models or
tensors; the planner compiles cells, the reference engine reads them as they are.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from fasttrace.checks import items, shown, whole_number
from fasttrace.errors import PlanError
from fasttrace.experiment.sites import SITE, SITES

SOURCES: tuple[str, ...] = ("clean", "corrupted")
STREAMS: tuple[str, ...] = ("block_output", "mlp_activation", "attention_output")
"""The three streams of the paper's figure, in its order."""

MOST_BLOCKS = 2**31 - 1
"""Widest window; one wider than the model is clipped to it."""


class Edit(NamedTuple):
    """One write in a restored run: the value at (site, layer, position) is replaced by the source run's.

    Attributes:
        site: a component, by pyvene's names; `mlp_activation` is the input of the MLP's down projection.
        layer: block index, from 0.
        position: token index, from 0.
        source: "clean", or "corrupted" (the same noise sample, nothing restored).
    """

    site: str
    layer: int
    position: int
    source: str = "clean"


Cell = tuple[Edit, ...]


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


@lru_cache(maxsize=256)
def grid_cells(stream: str, window: int, n_layers: int, n_positions: int) -> tuple[Cell, ...]:
    """The cells of one grid, layer by layer: cell (l, p) is item `l * n_positions + p`."""
    columns = [tuple(Edit(stream, block, position) for block in range(n_layers)) for position in range(n_positions)]
    windows = (window_of(layer, window, n_layers) for layer in range(n_layers))
    return tuple(column[blocks.start : blocks.stop] for blocks in windows for column in columns)
