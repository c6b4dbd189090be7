"""Cells: what a sweep asks for, one set of edits per square of a grid.

A cell says which values of the corrupted run are overwritten, and with what. It knows nothing of models or
tensors; the planner compiles cells, the reference engine reads them as they are.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from fasttrace.errors import PlanError

SITES: tuple[str, ...] = ("block_input", "block_output", "attention_output", "mlp_output", "mlp_activation")
SOURCES: tuple[str, ...] = ("clean", "corrupted")
STREAMS: tuple[str, ...] = ("block_output", "mlp_activation", "attention_output")
"""The three streams of the paper's figure, in its order."""

SINGLE_BLOCK_SITES = frozenset({"block_input", "block_output"})
"""Sites that carry the whole residual stream: restoring a window of them equals restoring its last block."""


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
    if isinstance(streams, str):
        streams = (streams,)
    unknown = [s for s in streams if s not in SITES]
    if unknown:
        raise PlanError(f"unknown stream {unknown[0]!r}; choose from {', '.join(SITES)}")
    if not streams:
        raise PlanError(f"no stream given; choose one or more of {', '.join(SITES)}")
    if len(set(streams)) < len(streams):
        raise PlanError(f"a stream is given twice in {tuple(streams)}; name each once")
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise PlanError(f"window is {window!r}: it needs a whole width >= 1; window=1 restores single blocks")
    return {s: 1 if s in SINGLE_BLOCK_SITES else window for s in streams}


@lru_cache(maxsize=256)
def grid_cells(stream: str, window: int, n_layers: int, n_positions: int) -> tuple[Cell, ...]:
    """The cells of one grid, layer by layer: cell (l, p) is item `l * n_positions + p`."""
    columns = [tuple(Edit(stream, block, position) for block in range(n_layers)) for position in range(n_positions)]
    windows = (window_of(layer, window, n_layers) for layer in range(n_layers))
    return tuple(column[blocks.start : blocks.stop] for blocks in windows for column in columns)
